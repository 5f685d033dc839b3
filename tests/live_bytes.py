"""How many bytes of tensors are alive, counted storage by storage while a block runs."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`peak` is the most bytes that tensors made in the block held at one time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __enter__(self):
        self._frombuffer = torch.frombuffer  # which no dispatch mode sees
        torch.frombuffer = self._counted
        return super().__enter__()

    def __exit__(self, *error):
        torch.frombuffer = self._frombuffer
        return super().__exit__(*error)

    def _counted(self, *args, **kwargs):
        found = self._frombuffer(*args, **kwargs)
        self._note(found, given=set())
        return found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        given = {id(t.untyped_storage()) for t in leaves if isinstance(t, torch.Tensor)}
        self._note(found, given)
        return found

    def _note(self, found, given):
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if id(storage) not in given and id(storage) not in self.live:
                    self.live[id(storage)] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, id(storage), None)
        self.peak = max(self.peak, sum(self.live.values()))
