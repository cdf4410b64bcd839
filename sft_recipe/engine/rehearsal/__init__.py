"""Runs training steps of the engine on GPUs that do not exist, and reports kernels, synchronizations and peak memory.

Tensors are fake (shapes and dtypes without data), collectives too, so that one CPU process rehearses any of up to
thousands of ranks. It cannot prove numerics, NCCL, streams, fragmentation, or what a kernel allocates by itself.

    session.py    starts the process below and sends it cases; start here
    __main__.py   loads the device guard before PyTorch, and forks once per case
    step.py       builds the engine of a case and runs its steps
    device.py     torch.cuda as a GPU that does not exist answers
    memory.py     the bytes on the device, the kernels called, and the calls that wait for the device
    guard.py      compiles guard.cpp
"""
