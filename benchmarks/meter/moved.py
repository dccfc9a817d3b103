"""Counts what ZeRO-3 moves between the ranks, for sitecustomize.py and for tests/helpers/engine_probe.py."""


def count_moved():
    """A dict that counts from now on: elements that this rank gets ("all_gather") and gives ("reduce_scatter")."""
    from deepspeed.comm.torch import TorchBackend

    moved = {"all_gather": 0, "reduce_scatter": 0}

    def counting(name, kind):
        original = getattr(TorchBackend, name)

        def counted(self, *args, **kwargs):
            whole_and_part = [*args, *kwargs.values()][:2]  # in either order
            moved[kind] += max(tensor.numel() for tensor in whole_and_part)
            return original(self, *args, **kwargs)

        setattr(TorchBackend, name, counted)

    counting("all_gather_into_tensor", "all_gather")
    counting("reduce_scatter_tensor", "reduce_scatter")
    return moved
