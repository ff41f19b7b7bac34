"""The official code's results for both forms of infinite self-attention."""

import torch
import torch.nn.functional as F

from support.mixer_contract import place_of


def check_pack(mixer, pack):
    """Compare a mixer of infinite self-attention, and its gradients, with the official code's."""
    rho = pack.meta["rho"]
    with torch.no_grad():
        mixer.rho_logit.fill_(torch.tensor(rho, dtype=torch.float64).logit())
    if pack.meta["op"] == "infsa_functional":
        leaves = {f"d{key}": pack[key].requires_grad_() for key in "qkv"}
        q, k, v = leaves.values()
    else:
        leaves = {f"d{key}": pack[key].requires_grad_() for key in pack.arrays if key == "x" or key.startswith("w.")}
        parts = (F.linear(leaves["dx"], *_layer(leaves, f"{which}_proj")) for which in "qkv")
        q, k, v = (x.unflatten(2, (pack.meta["heads"], -1)).transpose(1, 2) for x in parts)
    out = mixer(q, k, v, place_of((q.shape[2], 1), 0, q, k))
    if pack.meta["op"] == "infsa":
        out = F.linear(out.transpose(1, 2).flatten(2), *_layer(leaves, "out_proj"))
    torch.testing.assert_close(out, pack["out"], rtol=0, atol=1e-9)
    out.backward(pack["grad"])
    for name, leaf in leaves.items():
        wanted = pack[name]
        # Some gradients are stored in float32.
        rounding = 1e-6 * wanted.abs().max().item() if pack.meta["arrays"][name][1] == "float32" else 1e-9
        torch.testing.assert_close(leaf.grad, wanted, rtol=0, atol=rounding)
    return q, k


def _layer(leaves, name):
    return leaves[f"dw.{name}.weight"], leaves[f"dw.{name}.bias"]
