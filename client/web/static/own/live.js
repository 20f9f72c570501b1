// Follows server-sent events while the page is seen; what a hidden page misses comes when it is seen again.

export class Live {
  // `url` without the cursor; `cursor` is the parameter that names the last id seen; handlers by event.
  constructor(url, cursor, handlers, onLost) {
    Object.assign(this, { url, cursor, handlers, onLost, last: null, ended: false, source: null });
    document.addEventListener("visibilitychange", () => this.turn());
    this.turn();
  }

  turn() {
    if (document.hidden || this.ended) this.close();
    else if (!this.source) this.open();
  }

  open() {
    const url = new URL(this.url, location.origin);
    if (this.last !== null) url.searchParams.set(this.cursor, this.last);
    const source = new EventSource(url);
    this.source = source;
    for (const [name, handle] of Object.entries(this.handlers)) {
      source.addEventListener(name, (event) => {
        if (event.lastEventId) this.last = event.lastEventId;
        this.onLost("");
        handle(event.data);
      });
    }
    source.addEventListener("end", () => this.end());
    source.addEventListener("problem", (event) => this.onLost(JSON.parse(event.data).detail));
    source.onerror = () => {
      if (source.readyState !== EventSource.CLOSED) this.onLost("The connection is lost; it is tried again.");
      else if (this.source === source) this.end();
    };
  }

  end() {
    this.ended = true;
    this.close();
  }

  close() {
    this.source?.close();
    this.source = null;
  }
}
