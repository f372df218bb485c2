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
    return run(model, batch)[:2]


def run(model, batch):
    """`token_losses`, and the loss of a Mixture-of-Experts model's routers, 0 where it is off."""
    routed = {"output_router_logits": True} if getattr(model.config, "output_router_logits", False) else {}
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    outputs = model(**inputs, use_cache=False, **routed)
    labels = batch["labels"][:, 1:]
    losses = cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    tokens = batch["attention_mask"].bool().flatten()
    return losses, labels != IGNORED, router_loss(model.config, outputs.router_logits, tokens) if routed else 0


def router_loss(config, logits, tokens):
    """coefficient × experts × Σ_e (choices of e per token) · (mean probability of e), over the tokens of all layers."""
    probabilities = torch.cat([layer[tokens].softmax(-1) for layer in logits])
    experts = probabilities.shape[1]
    chosen = probabilities.topk(config.num_experts_per_tok).indices
    shares = torch.stack([(chosen == expert).any(1).float().mean() for expert in range(experts)])
    return config.router_aux_loss_coef * experts * (shares * probabilities.mean(0)).sum()


def train_loss(model, window, part):
    """What micro-batch number `part` adds to what an update trains on: to L(θ; B), and to the routers' loss."""
    losses, _, routers = run(model, window[part])
    return losses.sum() / count(window) + routers / len(window)


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


def plain(model, window):
    """g(θ; B)."""
    return gradient(model, lambda m: plain_loss(m, window))


def sft(model, window):
    """The gradient of what an update trains on."""
    return gradient(model, lambda m: sum(train_loss(m, window, part) for part in range(len(window))))


def patcher(model, window, vector, alpha):
    attacked = plain(moved(model, vector, 1), window)
    return combined((1 - alpha, sft(model, window)), (alpha, attacked))


def retention(model, origin, window, layers):
    """R(θ; K) and its gradient; `layers`: the names of the decoder layers."""

    def moved(now, before):
        return ((now - before) @ (now - before)) / (before @ before)

    return _beside(model, origin, window, layers, lambda batch: batch["attention_mask"] == 1, moved)


def back_to(origin, weights, share):
    """The weights, by name, a share of the way back to those of the beginning."""
    return {name: tensor + share * (origin[name] - tensor) for name, tensor in weights.items()}


def rerouting(model, origin, window, layers):
    """C(θ'; H) and its gradient, `model` having the weights θ'; `layers`: the names of the decoder layers."""

    def alike(now, before):
        return torch.clamp((now @ before) / (now.norm() * before.norm()), min=0)

    def answering(batch):
        """Where the next token is an answer's."""
        mask = torch.zeros_like(batch["labels"], dtype=torch.bool)
        mask[:, :-1] = batch["labels"][:, 1:] != -100
        return mask

    return _beside(model, origin, window, layers, answering, alike)


def _beside(model, origin, window, layers, counted, measure):
    """The mean of a measure over layers and counted tokens, and its gradient."""

    def streams(model, batch):
        found = []
        with ExitStack() as stack:
            for name in layers:
                module = model.get_submodule(name)
                stack.callback(module.register_forward_hook(lambda _, __, out: found.append(first(out))).remove)
            run(model, batch)
        return found

    def loss_of(model):
        total, count = 0, 0
        for batch in window:
            with torch.no_grad():
                before = streams(origin, batch)
            for now, known in zip(streams(model, batch), before, strict=True):
                for row, token in counted(batch).nonzero().tolist():
                    total = total + measure(now[row, token], known[row, token])
                    count += 1
        return total / count

    return loss_of(model).detach(), gradient(model, loss_of)


def first(output):
    return output[0] if isinstance(output, tuple) else output


def shifted(output, shift):
    return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift


def vaccine(model, window, rho, mixers):
    """`mixers`: the names of the modules that are shifted."""
    model = copy.deepcopy(model)
    modules = [model.get_submodule(name) for name in mixers]
    total = 0
    for part in range(len(window)):
        outputs = []
        with ExitStack() as stack:
            for module in modules:
                handle = module.register_forward_hook(lambda _, __, out, seen=outputs: seen.append(first(out)))
                stack.callback(handle.remove)
            loss = train_loss(model, window, part)
        found = torch.autograd.grad(loss, outputs)
        length = torch.cat([g.flatten() for g in found]).norm()
        with ExitStack() as stack:
            for module, g in zip(modules, found, strict=True):
                shift = rho * g / length
                handle = module.register_forward_hook(lambda _, __, out, shift=shift: shifted(out, shift))
                stack.callback(handle.remove)
            total = total + train_loss(model, window, part)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


def booster(model, window, harmful, alpha, lam):
    g_harmful = plain(model, harmful)
    after = plain(moved(model, g_harmful, -alpha / size(g_harmful)), harmful)
    return combined((1, sft(model, window)), (lam, g_harmful), (-lam, after))


def antibody_align(model, window, harmful, refusals, rho, refusal_weight, strength, flatness_rule):
    g_harmful = plain(model, harmful)
    after = moved(model, g_harmful, -rho / size(g_harmful))
    flatness = combined((1, g_harmful), (-1, plain(after, harmful)))
    g = sft(model, window)
    if flatness_rule == "kkt":
        weight = max(0, strength - product(flatness, g) / product(flatness, flatness))
    else:
        weight = max(0, strength - product(flatness, g) / (size(flatness) * size(g)))
    return combined((1, g), (weight, flatness), (refusal_weight, plain(after, refusals)))


def lisa(model, window, anchor, rho):
    """An update in the safety state."""
    g = plain(model, window)
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
            losses, asked, routers = run(m, batch)
            parts.append((weights * losses.sum(1)).sum() / (weights * asked.sum(1)).sum() + routers)
        return sum(parts) / len(parts)

    return gradient(model, loss)


def spag(model, batch, tau, eta):
    """The weights after the euclidean projection."""
    loss = plain_loss(model, [batch]).item()
    g = plain(model, [batch])
    step = min((loss - tau) / product(g, g), eta) if loss > tau else 0.0
    return {name: p.detach() for name, p in moved(model, g, -step).named_parameters()}
