"""The memory that daemon and server share, and how it changes hands.

memory.py       memory behind descriptors, and how a CPU's is allocated
cuda_memory.py  how a GPU's is
cuda_ipc.py     how a GPU's is where its driver has none behind descriptors
owner.py        the process on whose life that depends
devices.py      which of them a device has
cuda_driver.py  the calls of the CUDA driver that takes, checked
control.py      the page of words beside the weights
protocol.py     messages with descriptors over a Unix socket
client.py       the server's end: ask, offer
hub.py          the daemon's end: hold, take
"""
