// One chart: curves over steps, drawn with uPlot, and their last values as text.

import { smooth } from "./series.js";

const HEIGHT = 240;
const X_AXIS = 34;
const COLOURS = 8;
const MOST_MARKED = 60; // points of a line, or evaluations, that are marked one by one
const MARKS = { attempt: ["--muted", false], wait: ["--warn", true], evaluation: ["--mark", true] }; // colour, and whether it is dashed
const dark = matchMedia("(prefers-color-scheme: dark)");
const sync = uPlot.sync("steps");

export function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2);
  return Number(value.toPrecision(4)).toLocaleString("en");
}

const isMarked = (line) => (line.points && line.steps.length <= MOST_MARKED) || line.steps.length === 1;

export class Chart {
  constructor(parent, title, unit, view) {
    Object.assign(this, { view, lines: [], marks: [], plot: null, shape: "", isNear: false, isStale: false });
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
    new ResizeObserver(() => this.resize()).observe(this.box);
    new IntersectionObserver((entries) => this.near(entries.at(-1).isIntersecting), { rootMargin: "300px" }).observe(this.figure);
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
    this.text.textContent = this.lines.map((line) => `${line.label}: ${short(line.values.at(-1))}`).join(" · ");
    this.isStale = true;
    this.paint();
  }

  // True if the figure is in sight, or soon will be; others are drawn once they are.
  near(isNear) {
    this.isNear = isNear;
    this.paint();
  }

  paint() {
    if (!this.isNear || !this.isStale) return;
    this.isStale = false;
    const shape = JSON.stringify([this.view.log, this.lines.map((line) => [line.label, isMarked(line)])]);
    if (!this.plot || shape !== this.shape) this.make();
    else this.plot.setData(this.data());
    this.shape = shape;
  }

  resize() {
    const size = this.size();
    if (this.plot && this.plot.width !== size.width) this.plot.setSize(size);
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
        axes: [{ ...axis, size: X_AXIS }, { ...axis, size: 64, values: (_, ticks) => ticks.map((each) => (each === null ? "" : short(each))) }],
        series: [
          { label: "step" },
          ...this.lines.map((line, at) => ({
            label: line.label,
            stroke: colour(`--curve-${at % COLOURS}`),
            width: 1.5,
            dash: at >= COLOURS ? [6, 4] : undefined,
            spanGaps: true,
            points: { show: isMarked(line), size: 7 },
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
    const seen = this.marks.map((mark) => ({ ...mark, x: plot.valToPos(mark.step, "x", true) })).filter(({ x }) => x >= bbox.left && x <= bbox.left + bbox.width);
    ctx.save();
    ctx.lineWidth = devicePixelRatio;
    ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    for (const [kind, [name, isDashed]] of Object.entries(MARKS)) {
      const marks = seen.filter((mark) => mark.kind === kind);
      if (!marks.length || (kind === "evaluation" && marks.length > MOST_MARKED)) continue;
      ctx.strokeStyle = ctx.fillStyle = colour(name);
      ctx.setLineDash(isDashed ? [3 * devicePixelRatio, 4 * devicePixelRatio] : []);
      ctx.beginPath();
      for (const { x, text } of marks) {
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        if (text) ctx.fillText(text, x + 3 * devicePixelRatio, bbox.top + 11 * devicePixelRatio);
      }
      ctx.stroke();
    }
    ctx.restore();
  }
}
