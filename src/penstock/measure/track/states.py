"""A slot's state. Only `done` slots were probed whole; an interrupted one has some requests."""

RUNNING, DONE, MISSED, FAILED, INTERRUPTED = "running", "done", "missed", "failed", "interrupted"
