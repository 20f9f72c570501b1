// One chart: curves over steps, drawn with uPlot, and their last values as text.

import { smooth } from "./series.js";

const HEIGHT = 240;
const COLOURS = 8;
const dark = matchMedia("(prefers-color-scheme: dark)");
const sync = uPlot.sync("steps");

export function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2);
  return Number(value.toPrecision(4)).toLocaleString("en");
}

export class Chart {
  constructor(parent, title, unit, view) {
    Object.assign(this, { view, lines: [], marks: [], plot: null, shape: "" });
    this.figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    const heading = document.createElement("h3");
    heading.textContent = unit ? `${title}, ${unit}` : title;
    this.text = document.createElement("p");
    this.text.className = "muted last";
    this.box = document.createElement("div");
    caption.append(heading, this.text);
    this.figure.append(caption, this.box);
    parent.append(this.figure);
    new ResizeObserver(() => this.plot?.setSize(this.size())).observe(this.box);
    dark.addEventListener("change", () => this.plot && this.make());
  }

  // `lines`: label, steps, values and whether they are marked points; `marks`: step, text, kind.
  show(lines, marks) {
    this.lines = lines;
    this.marks = marks;
    this.draw();
  }

  draw() {
    this.figure.hidden = this.lines.length === 0;
    if (!this.lines.length) return;
    this.text.textContent = this.lines.map((line) => `${line.label} ${short(line.values.at(-1))}`).join(" · ");
    const shape = JSON.stringify([this.view.log, this.lines.map((line) => line.label)]);
    if (!this.plot || shape !== this.shape) this.make();
    else this.plot.setData(this.data());
    this.shape = shape;
  }

  data() {
    const allowed = (value) => (value === null || (this.view.log && value <= 0) ? null : value);
    return uPlot.join(
      this.lines.map((line) => [line.steps, (line.points ? line.values : smooth(line.values, this.view.smoothing)).map(allowed)]),
    );
  }

  size() {
    return { width: Math.max(200, this.box.clientWidth), height: HEIGHT };
  }

  make() {
    this.plot?.destroy();
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } };
    this.plot = new uPlot(
      {
        ...this.size(),
        cursor: { sync: { key: sync.key }, drag: { x: true, y: false, setScale: false } },
        scales: {
          x: { time: false, range: (_, min, max) => this.view.range(min, max) },
          y: {
            distr: this.view.log ? 3 : 1,
            range: (_, min, max) => {
              if (min === null || min === undefined) return [this.view.log ? 0.1 : 0, 1];
              return this.view.log ? uPlot.rangeLog(min, max, 10, false) : uPlot.rangeNum(min, max, 0.1, true);
            },
          },
        },
        axes: [axis, { ...axis, size: 64, values: (_, ticks) => ticks.map((each) => (each === null ? "" : short(each))) }],
        series: [
          { label: "step" },
          ...this.lines.map((line, at) => ({
            label: line.label,
            stroke: colour(`--curve-${at % COLOURS}`),
            width: 1.5,
            dash: at >= COLOURS ? [6, 4] : undefined,
            spanGaps: true,
            points: { show: line.points || line.steps.length === 1, size: 7 },
            value: (_, value) => short(value),
          })),
        ],
        hooks: {
          setSelect: [(plot) => this.select(plot)],
          draw: [(plot) => this.drawMarks(plot, colour)],
        },
      },
      this.data(),
      this.box,
    );
    this.plot.over.addEventListener("dblclick", () => this.view.setZoom(null));
  }

  select(plot) {
    if (plot.select.width < 4) return;
    const [min, max] = [plot.select.left, plot.select.left + plot.select.width].map((at) => plot.posToVal(at, "x"));
    plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    this.view.setZoom({ min, max });
  }

  drawMarks(plot, colour) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.lineWidth = devicePixelRatio;
    ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    for (const { step, text, kind } of this.marks) {
      const x = plot.valToPos(step, "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.strokeStyle = ctx.fillStyle = colour({ attempt: "--muted", wait: "--warn" }[kind] ?? "--mark");
      ctx.setLineDash(kind === "attempt" ? [] : [3 * devicePixelRatio, 4 * devicePixelRatio]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      if (text) ctx.fillText(text, x + 3 * devicePixelRatio, bbox.top + 11 * devicePixelRatio);
    }
    ctx.restore();
  }
}
