// Fields of a run file's messages, from its JSON Schema: kind, default, range and description of each.

const LONG_CHARS = 10000;
const LONG = new Set(["chat_template", "sparse_target_reason"]);

export class Schema {
  constructor(document) {
    this.messages = document.$defs;
    this.root = document.$ref.split("/").pop();
  }

  fields(message) {
    const { properties, required = [] } = this.messages[message];
    return Object.entries(properties)
      .filter(([, rules]) => !rules.$ref?.includes("/properties/"))
      .map(([name, rules]) => ({ name, rules, required: required.includes(name), description: rules.description || "", ...kindOf(name, rules) }));
  }
}

function kindOf(name, rules) {
  if (rules.$ref) return { kind: "message", message: rules.$ref.split("/").pop() };
  if (rules.anyOf) return { kind: "list", items: rules.anyOf.find((each) => each.items).items };
  const types = [rules.type].flat();
  if (rules.contentMediaType) return { kind: "text", long: true };
  if (rules.items?.$ref) return { kind: "messages", message: rules.items.$ref.split("/").pop() };
  if (rules.additionalProperties) return { kind: "map" };
  if (rules.enum) return { kind: "choice", choices: rules.enum.filter((each) => each !== null).map(String) };
  if (types.includes("boolean")) return { kind: "choice", choices: ["true", "false"] };
  if (types.includes("integer") || types.includes("number")) return { kind: "number" };
  return { kind: "text", long: LONG.has(name) || (rules.maxLength || 0) > LONG_CHARS };
}

// The values that a field may have, as a sentence; empty without any limit.
export function rangeText({ kind, rules, items, choices, default: _ }) {
  const limits = items || rules;
  const parts = [];
  if (kind === "list") parts.push("One in each line.");
  if (kind === "map") parts.push("One in each line, as name: value.");
  if (kind === "list" && limits.enum) parts.push(`Possible: ${limits.enum.join(", ")}.`);
  const { minimum, maximum, exclusiveMinimum, exclusiveMaximum } = limits;
  const bounds = [
    minimum !== undefined && `at least ${minimum}`,
    exclusiveMinimum !== undefined && `above ${exclusiveMinimum}`,
    maximum !== undefined && `at most ${maximum}`,
    exclusiveMaximum !== undefined && `below ${exclusiveMaximum}`,
  ].filter(Boolean);
  if (bounds.length) parts.push(`${bounds.join(", ")}.`.replace(/^./, (first) => first.toUpperCase()));
  if (kind === "choice" && choices.length === 1) parts.push(`Possible: ${choices[0]}.`);
  if (limits.maxLength) parts.push(`At most ${limits.maxLength.toLocaleString("en")} characters.`);
  return parts.join(" ");
}
