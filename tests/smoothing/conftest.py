import torch


def parameters(model):
    """Copies of a model's parameters by their names."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model, before):
    """Whether they are those, to the bit."""
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())
