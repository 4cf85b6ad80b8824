"""One engine in a process of its own: `python -m benchmarks.gpu.workers.<engine> JOB`.

JOB is a file that holds a `worker.Job` as JSON. Each cell's result is a line of JSON on stdout.
"""
