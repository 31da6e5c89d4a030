"""The memory that daemon and server share, and how it changes hands.

memory.py       one allocation behind one descriptor
cuda_memory.py  the same on a GPU (nothing uses it yet)
cuda_driver.py  the calls of the CUDA driver that takes, checked
control.py      the page of words beside the weights
protocol.py     messages with descriptors over a Unix socket
client.py       the server's end: ask, offer
hub.py          the daemon's end: hold, take
"""
