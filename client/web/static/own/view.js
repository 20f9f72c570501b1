// Settings that all charts of a page share: range of steps, smoothing, scale.

const get = (id) => document.getElementById(id);

export class View {
  // `onZoom` is given the new range of steps, or null for all.
  constructor(onChange, onZoom = () => {}) {
    Object.assign(this, { onChange, onZoom });
    this.zoom = null;
    this.smoothing = 0;
    this.log = false;
    get("smoothing").addEventListener("input", () => {
      this.smoothing = Number(get("smoothing").value);
      get("smoothing-value").textContent = String(this.smoothing);
      onChange();
    });
    get("log-scale").addEventListener("change", () => {
      this.log = get("log-scale").checked;
      onChange();
    });
    for (const id of ["from-step", "to-step"]) get(id).addEventListener("change", () => this.fromFields());
    get("all-steps").addEventListener("click", () => this.setZoom(null));
    get("chart-controls").addEventListener("submit", (event) => event.preventDefault());
  }

  setZoom(zoom) {
    this.zoom = zoom;
    get("from-step").value = zoom ? Math.floor(zoom.min) : "";
    get("to-step").value = zoom && Number.isFinite(zoom.max) ? Math.ceil(zoom.max) : "";
    this.onZoom(zoom);
    this.onChange();
  }

  fromFields() {
    const [from, to] = ["from-step", "to-step"].map((id) => get(id).value);
    const zoom = { min: from === "" ? 0 : Number(from), max: to === "" ? Infinity : Number(to) };
    this.zoom = (from === "" && to === "") || zoom.max <= zoom.min ? null : zoom;
    this.onZoom(this.zoom);
    this.onChange();
  }

  // Bounds of the steps to draw, of which there are those from `min` to `max`.
  range(min, max) {
    if (min === null || min === undefined) return [0, 1];
    const low = this.zoom ? this.zoom.min : min;
    const high = this.zoom && Number.isFinite(this.zoom.max) ? this.zoom.max : Math.max(max, low);
    return low === high ? [low - 1, high + 1] : [low, high];
  }
}
