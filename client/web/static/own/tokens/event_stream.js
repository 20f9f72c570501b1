// Server-sent events of a response to a POST, which EventSource cannot make: {event, data}, with data parsed.

export class Events {
  constructor(body) {
    this.reader = body.pipeThrough(new TextDecoderStream()).getReader();
  }

  async *[Symbol.asyncIterator]() {
    let rest = "";
    for (;;) {
      const { value, done } = await this.reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const fields = { event: "message", data: "" };
        for (const line of part.split("\n")) {
          const at = line.indexOf(": ");
          if (at > 0) fields[line.slice(0, at)] = line.slice(at + 2);
        }
        if (fields.data) yield { event: fields.event, data: JSON.parse(fields.data) };
      }
    }
  }
}
