"""Generate, grade, and count: pass@1, avg@k and pass@k over benchmark rows."""
