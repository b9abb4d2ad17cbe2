"""Environment variables of a worker: those that it is given and those that it reads."""

WORKER_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "20000",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""The same for every implementation. OpenMP threads spin for about 0.2 ms between parallel regions, then sleep: a
sleeping thread costs a wake-up of 0.1 ms or more in a virtual machine, as much as a small kernel, and one that spins on
takes a core from the threads of another library that runs next. The allocator keeps its heap,
so that page faults are not timed."""

KEEP_MODELS = "SASA_BENCH_KEEP_MODELS"
"""Environment variable of a worker: the folder where models that were exported are kept; without it, none are."""

EXPORTS = "SASA_BENCH_EXPORTS"
"""Environment variable of a worker: a folder of exported models that processes share which run the same code; what is
there is not exported again. Without it, every build exports."""
