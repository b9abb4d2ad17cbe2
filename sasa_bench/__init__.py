"""What does local self-attention cost next to a convolution, and which implementation should I use?

`run` measures cases or suites in a worker process, as the command line does, and gives a table; `load` gives the table
of results files; `measure` times a function of your own in this process. `local_attention` makes an implementation, an
`Impl`, of a kernel; `LocalAttention2d` and `network` are torch modules that any implementation runs.
"""

import lazy_loader

# Torch takes seconds to import, and readers of results do without it: the stub names what is imported on first use.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
