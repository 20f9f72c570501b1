// Elements with properties, data- and aria- attributes, and children; text is never read as HTML.

export function element(tag, properties = {}, ...children) {
  const { data = {}, aria = {}, ...others } = properties;
  const result = Object.assign(document.createElement(tag), others);
  for (const [name, value] of Object.entries(data)) result.dataset[name] = value;
  for (const [name, value] of Object.entries(aria)) result.setAttribute(name === "role" ? name : `aria-${name}`, value);
  result.append(...children.filter((each) => each !== null && each !== undefined));
  return result;
}
