"""What a training run writes: the adapter that it trained, or the whole transformer."""
from checkpoints.formats import save_adapter, save_whole
from checkpoints.state import weights


def save_trained(path, net, adapter, model, rank, task, anchor, **fields):
    """Write what learned, and return the path.

    adapter: the name of the adapter that learned, which becomes PATH.pt. None: the whole net
    learned, and it becomes PATH.safetensors, a model file. Every rank has to call it, since the
    net may be sharded; rank 0 writes. fields: r, alpha, settings and what else an adapter's file
    should say.
    """
    if adapter is None:
        return save_whole(path.with_suffix(".safetensors"), weights(net), model.file, rank,
                          task=task, anchor=anchor)
    return save_adapter(path, rank, task=task, anchor=anchor, base=model.fingerprint,
                        tensors=net.adapter(adapter), **fields)
