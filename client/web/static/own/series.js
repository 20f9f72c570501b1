// Metric series of a run: from the history and from live points, in the order of steps.

const MOST_POINTS = 20000;
const THINNED_POINTS = 900;  // the service sends up to 1,000 of a series, and at least so many of one that has more

export const finite = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);

export class Series {
  constructor() {
    this.columns = new Map();
  }

  // The history, with the live points that came behind it kept.
  fill(series) {
    for (const { key, steps, values } of series) {
      const live = this.columns.get(key);
      const column = { steps: [...steps], values: values.map(finite) };
      const last = column.steps.at(-1) ?? -1;
      live?.steps.forEach((step, at) => {
        if (step > last) push(column, step, live.values[at]);
      });
      this.columns.set(key, column);
    }
  }

  // A live point; those at its step or behind it were rolled back.
  add(point) {
    for (const [key, value] of Object.entries(point.values)) {
      if (!this.columns.has(key)) this.columns.set(key, { steps: [], values: [] });
      const column = this.columns.get(key);
      while (column.steps.length && column.steps.at(-1) >= point.step) {
        column.steps.pop();
        column.values.pop();
      }
      push(column, point.step, finite(value));
    }
  }

  // True if the service may have more points of some series than these.
  isThinned() {
    return [...this.columns.values()].some((column) => column.steps.length >= THINNED_POINTS);
  }

  keys(matches) {
    return [...this.columns.keys()].filter(matches).sort();
  }
}

function push(column, step, value) {
  column.steps.push(step);
  column.values.push(value);
  if (column.steps.length > 2 * MOST_POINTS) {
    for (const name of ["steps", "values"]) column[name] = column[name].filter((_, at) => at % 2 === 0);
  }
}

// Exponential moving average without bias at the start; weight 0 leaves the values as they are.
export function smooth(values, weight) {
  if (!weight) return values;
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}
