"""Every method's step in plain torch, slowly: whole copies of the model, autograd, and nothing from holdfast.

A window is a list of global micro-batches, each a dict of tensors; models are never changed.
"""

import copy
from contextlib import ExitStack

import torch
from torch.nn.functional import cross_entropy

IGNORED = -100


def token_losses(model, batch):
    """Per-token losses (rows, tokens − 1), zero where nothing is trained on, and which tokens are."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses, labels != IGNORED


def count(window):
    return sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in window)


def plain_loss(model, window):
    """L(θ; B): the mean over all completion tokens of the window."""
    return sum(token_losses(model, batch)[0].sum() for batch in window) / count(window)


def gradient(model, loss_of):
    """The gradient of `loss_of(model)` by name, of the parameters that are trained."""
    model = copy.deepcopy(model)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(loss_of(model), parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def moved(model, vector, scale):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in vector:
                parameter += scale * vector[name]
    return model


def combined(*terms):
    """Σ factor · vector."""
    return {name: sum(factor * vector[name] for factor, vector in terms) for name in terms[0][1]}


def product(a, b):
    return sum((a[name].double() * b[name].double()).sum() for name in a).item()


def size(vector):
    return product(vector, vector) ** 0.5


def sft(model, window):
    return gradient(model, lambda m: plain_loss(m, window))


def patcher(model, window, vector, alpha):
    attacked = sft(moved(model, vector, 1), window)
    return combined((1 - alpha, sft(model, window)), (alpha, attacked))


def vaccine(model, window, rho, attention):
    """`attention`: the names of the attention modules."""
    model = copy.deepcopy(model)
    modules = [model.get_submodule(name) for name in attention]
    total = 0
    for batch in window:
        outputs = []
        with ExitStack() as stack:
            for module in modules:
                handle = module.register_forward_hook(lambda _, __, out, seen=outputs: seen.append(out[0]))
                stack.callback(handle.remove)
            loss = plain_loss(model, [batch])
        found = torch.autograd.grad(loss, outputs)
        length = torch.cat([g.flatten() for g in found]).norm()
        with ExitStack() as stack:
            for module, g in zip(modules, found, strict=True):
                shift = rho * g / length
                handle = module.register_forward_hook(lambda _, __, out, shift=shift: (out[0] + shift, *out[1:]))
                stack.callback(handle.remove)
            total = total + token_losses(model, batch)[0].sum() / count(window)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


def booster(model, window, harmful, alpha, lam):
    g_harmful = sft(model, harmful)
    after = sft(moved(model, g_harmful, -alpha / size(g_harmful)), harmful)
    return combined((1, sft(model, window)), (lam, g_harmful), (-lam, after))


def antibody_align(model, window, harmful, refusals, rho, refusal_weight, strength, flatness_rule):
    g_harmful = sft(model, harmful)
    after = moved(model, g_harmful, -rho / size(g_harmful))
    flatness = combined((1, g_harmful), (-1, sft(after, harmful)))
    g = sft(model, window)
    if flatness_rule == "kkt":
        weight = max(0, strength - product(flatness, g) / product(flatness, flatness))
    else:
        weight = max(0, strength - product(flatness, g) / (size(flatness) * size(g)))
    return combined((1, g), (weight, flatness), (refusal_weight, sft(after, refusals)))


def lisa(model, window, anchor, rho):
    g = sft(model, window)
    weights = dict(model.named_parameters())
    return {name: g[name] + rho * (weights[name].detach() - anchor[name]) for name in g}


def margins(model, batch, refusals):
    """r_i of every row."""

    def mean_nll(view):
        losses, asked = token_losses(model, view)
        return losses.sum(1) / asked.sum(1)

    with torch.no_grad():
        return mean_nll(refusals) - mean_nll(batch)


def antibody_finetune(model, window, refusals, tau):
    def loss(m):
        parts = []
        for batch, refusal in zip(window, refusals, strict=True):
            weights = torch.softmax(margins(m, batch, refusal) / tau, 0)
            losses, asked = token_losses(m, batch)
            parts.append((weights * losses.sum(1)).sum() / (weights * asked.sum(1)).sum())
        return sum(parts) / len(parts)

    return gradient(model, loss)


def spag(model, batch, tau, eta):
    """The weights after the euclidean projection."""
    loss = plain_loss(model, [batch]).item()
    g = sft(model, [batch])
    step = min((loss - tau) / product(g, g), eta) if loss > tau else 0.0
    return {name: p.detach() for name, p in moved(model, g, -step).named_parameters()}
