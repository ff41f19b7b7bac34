"""M3ViT: the contract, golden packs of the authors' code, routing, tasks, others' weights."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from support.contract import BackboneContract
from support.golden_packs import ROOT, Pack, normal, sampled
from support.seeded import build, image

from terrazzo.backbones import m3vit
from terrazzo.errors import InputError, WeightsError

SLOW = pytest.mark.slow


class TestM3ViT(BackboneContract):
    """Counted in the authors' backbone (17,983,680 and 43,420,032), plus the norm and the classifier.

    Multiply-adds: one task of the authors' backbones; here a second router and the classifier are counted, too.
    """

    representatives = ("m3vit_tiny",)
    operators_of = "s2aformer"
    untrained = ("m3vit_tiny", "m3vit_small")
    shallow = {"m3vit_tiny": dict(depth=2)}
    costs = {
        "m3vit_tiny": (17_983_680 + 2 * 192 + 193_000, 0.783),
        "m3vit_small": (43_420_032 + 2 * 384 + 385_000, 39.19),
    }


def of(options: dict, **more) -> m3vit.M3ViT:
    """The model of a pack's options."""
    taken = ("embed_dim", "num_heads", "depth", "experts", "top_k", "expert_hidden", "router", "gate_input_ahead")
    arguments = {name: options[name] for name in taken} | dict(img_size=options["img"])
    if options["task_dim"] > 0:
        arguments["task_dim"] = options["task_dim"]
    tasks = [f"task{i}" for i in range(options["tasks"])]
    return timm.create_model("m3vit_tiny", tasks=tasks, **arguments, **more)


@pytest.fixture
def chosen(monkeypatch):
    """The weights and experts that the routers choose, in the order of calls."""
    seen, top_k = [], m3vit.top_k
    monkeypatch.setattr(m3vit, "top_k", lambda *args: seen.append(top_k(*args)) or seen[-1])
    return seen


def theirs(name: str) -> str:
    """The authors' name of a parameter."""
    return name.replace("stem.patches.", "patch_embed.proj.").removeprefix("stem.")


class TestGolden:
    @pytest.mark.parametrize(
        "name",
        [
            "tiny_cityscapes_2t",
            "mini_shared_router",
            "mini_task_conditioned",
            pytest.param("small_nyud_2t", marks=SLOW),
        ],
    )
    def test_backbone(self, name, chosen):
        """First the experts, then their weights, then samples of all blocks, for each task, in float64."""
        pack = Pack(ROOT / "m3vit" / f"{name}.npz")
        model = of(pack.meta["options"], num_classes=0, dtype=torch.float64).eval()
        model.load_state_dict(pack.weights(), strict=True)
        own = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("norm"))
        assert own == pack.meta["parameters"]
        for case in pack.meta["cases"]:
            key, x = f"{case['size'][0]}x{case['size'][1]}.task{case['task']}", pack.image(case)
            chosen.clear()
            with torch.set_grad_enabled("grad_norms" in case):
                x, state = model.begin(x, task=f"task{case['task']}")
                for i, block in enumerate(model.blocks):
                    x = model.run_unit(block, x, state)
                    if f"{key}.experts{i}" in pack.arrays:
                        weight, index = chosen[-1]
                        assert torch.equal(index, torch.from_numpy(pack.arrays[f"{key}.experts{i}"]).long())
                        wanted = torch.from_numpy(pack.arrays[f"{key}.weights{i}"])
                        torch.testing.assert_close(weight[: len(wanted)], wanted, rtol=0, atol=1e-10)
                    found = sampled(f"{key}.stage{i}", x)
                    torch.testing.assert_close(
                        found, torch.from_numpy(pack.arrays[f"{key}.stage{i}"]), rtol=0, atol=1e-8
                    )

            if "grad_norms" in case:
                model.zero_grad()
                x.backward(normal(f"grad:{key}", x.shape))
                for name, parameter in model.named_parameters():
                    wanted = case["grad_norms"].get(theirs(name))
                    found = None if parameter.grad is None else parameter.grad.norm().item()
                    assert found == (wanted if not wanted else pytest.approx(wanted, rel=1e-9)), name

    @pytest.mark.parametrize("name", ["moe_unit_e8_k2", "moe_unit_e16_k4_n7"])
    def test_mixture(self, name, chosen):
        """The output, all gradients, and the balance loss with its gradient."""
        pack = Pack(ROOT / "m3vit" / f"{name}.npz")
        arrays = {key: torch.from_numpy(value) for key, value in pack.arrays.items()}
        options = pack.meta["options"]
        mixture = m3vit.Mixture(options["dim"], options["hidden"], options["experts"], options["top_k"], 1, 0).double()
        mixture.load_state_dict(pack.weights(), strict=True)
        y, routing = arrays["y"].requires_grad_(), m3vit.Routing(task=0, balance=torch.zeros(()))
        out = mixture(y, routing)
        weight, index = chosen[-1]
        assert torch.equal(index, arrays["experts"].long())
        torch.testing.assert_close(weight, arrays["weights"], rtol=0, atol=1e-12)
        torch.testing.assert_close(out, arrays["out"], rtol=0, atol=1e-10)
        parameters = dict(mixture.named_parameters())
        grads = torch.autograd.grad(out, [y, *parameters.values()], arrays["grad"], retain_graph=True)
        torch.testing.assert_close(grads[0], arrays["dy"], rtol=0, atol=1e-10)
        for key, grad in zip(parameters, grads[1:]):
            wanted = arrays[f"dw.{key}"]
            found = grad if grad.shape == wanted.shape else sampled(f"dw.{key}", grad)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
        assert routing.balance.dtype == torch.float32
        assert routing.balance.item() == pytest.approx(pack.meta["balance_loss"], abs=1e-5)
        (grad,) = torch.autograd.grad(routing.balance, parameters["gate.0.w_gate"])
        torch.testing.assert_close(grad, arrays["dloss.gate.0.w_gate"], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("name", ["up_head_c64_1", pytest.param("up_head_c192_7", marks=SLOW)])
    def test_decoder(self, name):
        pack = Pack(ROOT / "m3vit" / f"{name}.npz")
        options = pack.meta["options"]
        head = m3vit.UpHead(options["dim"], options["n_out"]).double().eval()
        assert sum(p.numel() for p in head.parameters()) == pack.meta["parameters"]
        head.load_state_dict(pack.weights(), strict=False)
        height, width = (side // 16 for side in options["img"])
        tokens = normal("tokens", (options["batch"], 1 + height * width, options["dim"]))
        x = tokens[:, 1:].unflatten(1, (height, width)).permute(0, 3, 1, 2)
        with torch.no_grad():
            found = head(x)
        assert list(found.shape) == pack.meta["out_shape"]
        torch.testing.assert_close(sampled("out", found), torch.from_numpy(pack.arrays["out"]), rtol=0, atol=1e-8)


class TestCounts:
    @pytest.mark.parametrize(
        ("options", "wanted"),
        [
            (dict(), 43_420_032),
            (dict(tasks="abcde", img_size=(512, 512)), 43_463_040),
            (dict(top_k=2, expert_hidden=768), 71_768_448),
            (dict(router="task", task_dim=64), 43_393_792),
            (dict(embed_dim=768, expert_hidden=768), 171_774_720),
        ],
    )
    def test_the_authors_backbones(self, options, wanted):
        options = options | ({"tasks": list(options["tasks"])} if "tasks" in options else {})
        model = timm.create_model("m3vit_small", device="meta", num_classes=0, **options)
        assert sum(p.numel() for name, p in model.named_parameters() if not name.startswith("norm")) == wanted

    @pytest.mark.parametrize(
        ("dim", "channels", "wanted"),
        [(384, 40, 2_668_328), (384, 21, 2_663_445), (384, 1, 2_658_305), (768, 40, 3_553_832), (192, 7, 2_217_095)],
    )
    def test_decoders(self, dim, channels, wanted):
        assert sum(p.numel() for p in m3vit.UpHead(dim, channels, device="meta").parameters()) == wanted

    def test_a_deployed_model(self):
        """NYUD-v2: the backbone, and the decoders of segmentation and depth."""
        assert 43_420_032 + 2_668_328 + 2_658_305 == 48_746_665

    def test_one_task_costs_as_much_as_a_plain_vit(self):
        """12 (4 C^2 N + 2 C N^2) + 6 * 8 C^2 N + 6 (2 k C h + C E) N + 768 C (N - 1) multiply-adds for `m3vit_tiny`."""
        from torch.utils.flop_counter import FlopCounterMode

        model = timm.create_model("m3vit_tiny", num_classes=0, device="meta").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 128, 256, device="meta"), task="depth")
        c, n, k, hidden, experts = 192, 129, 2, 384, 16
        wanted = 12 * (4 * c * c * n + 2 * c * n * n) + 6 * 8 * c * c * n
        wanted += 6 * (2 * k * c * hidden + c * experts) * n + 768 * c * (n - 1)
        assert counter.get_total_flops() == 2 * wanted
        assert wanted / 1e9 == pytest.approx(0.783, abs=5e-4)


def mixture(experts=4, top_k=2, dim=8, hidden=6, gates=2):
    torch.manual_seed(0)
    found = m3vit.Mixture(dim, hidden, experts, top_k, gates, 0).double()
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    return found


def dense(found: m3vit.Mixture, x: torch.Tensor, weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """All experts on all tokens, by the definition."""
    first, second = found.experts.htoh4, found.experts.h4toh
    out = torch.zeros_like(x)
    for e in range(len(first.bias)):
        y = F.linear(F.gelu(F.linear(x, first.weight[e], first.bias[e])), second.weight[e], second.bias[e])
        out += (weight * (index == e)).sum(1, keepdim=True) * y
    return out


class TestRouting:
    def test_weights_are_raw_probabilities(self):
        """Softmax over all experts comes before the choice, and the chosen weights are not renormalised."""
        weight, index = m3vit.top_k(torch.tensor([[2.0, 1, 0, -1]]).softmax(-1), 2)
        assert index.tolist() == [[0, 1]]
        assert [round(x, 4) for x in weight[0].tolist()] == [0.6439, 0.2369]
        assert weight.sum().item() == pytest.approx(0.8808, abs=1e-4)

    def test_ties_take_the_lowest_experts(self):
        weight, index = m3vit.top_k(torch.full((50, 16), 1 / 16), 4)
        assert torch.equal(index, torch.arange(4).expand(50, -1))
        assert torch.equal(weight, torch.full((50, 4), 1 / 16))

    def test_all_equal_experts_are_one(self):
        """If all experts see a token, weights add up to 1, so equal experts give the result of a plain MLP."""
        found = mixture(top_k=4)
        with torch.no_grad():
            for parameter in found.experts.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter))
            x = torch.randn(2, 5, 8, dtype=torch.float64)
            first, second = found.experts.htoh4, found.experts.h4toh
            wanted = F.linear(F.gelu(F.linear(x, first.weight[0], first.bias[0])), second.weight[0], second.bias[0])
            torch.testing.assert_close(found(x, m3vit.Routing(task=1)), wanted)

    @pytest.mark.parametrize("tokens", [1, 7, 70])
    @pytest.mark.parametrize("crowd", [False, True])
    def test_sorted_pairs_equal_all_experts(self, tokens, crowd, chosen, monkeypatch):
        """Also with experts without tokens, with all tokens at the same experts, and as an exporter records it."""
        found = mixture(experts=6)
        x = torch.randn(1, tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        if crowd:
            x[:] = x[:, :1] + 1e-6 * x
        with torch.no_grad():
            out = found(x, m3vit.Routing(task=0))
            weight, index = chosen[-1]
            assert not crowd or len(index.unique()) == 2
            torch.testing.assert_close(out[0], dense(found, x[0], weight, index))
            monkeypatch.setattr(m3vit, "is_exporting", lambda: True)
            torch.testing.assert_close(found(x, m3vit.Routing(task=0)), out)

    def test_routers_compute_in_float32(self):
        router = m3vit.Router(8, 4)
        x = torch.randn(5, 8).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            found = router(x)
        assert torch.equal(found, x.float() @ router.w_gate)
        assert router(x.double()).dtype == torch.float64

    def test_router_reads_the_blocks_input(self, chosen):
        block = m3vit.Block(8, 2, 0.0, mixture(), ahead=True).double()
        x = torch.randn(1, 5, 8, dtype=torch.float64)
        with torch.no_grad():
            block(x, m3vit.Routing(task=1))
        wanted = m3vit.top_k((x[0] @ block.mlp.gate[1].w_gate).softmax(-1), 2)
        assert torch.equal(chosen[0][1], wanted[1])


class TestBalance:
    def test_equal_use_costs_nothing(self):
        index = torch.arange(16).view(8, 2)
        assert m3vit.balance_loss(torch.full((8, 2), 0.5), index, 16).item() == 0

    def test_one_expert_for_all(self):
        """The unbiased variance is E m^2 for a mean m, so importance and load give 16 each."""
        found = m3vit.balance_loss(torch.full((40, 1), 0.7), torch.zeros(40, 1, dtype=torch.int64), 16)
        assert found.item() == pytest.approx(32, rel=1e-5)

    def test_ties_are_not_balanced(self):
        """Equal logits all choose the lowest experts."""
        weight, index = m3vit.top_k(torch.full((9, 4), 0.25), 2)
        assert m3vit.balance_loss(weight, index, 4).item() == pytest.approx(8 / 3, rel=1e-5)

    def test_a_single_expert(self):
        assert m3vit.balance_loss(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64), 1).item() == 0

    @pytest.mark.parametrize("again", [False, True])
    def test_of_a_model(self, again):
        """The sum over its blocks, with a gradient for the task's routers; checkpointing changes nothing."""
        model = small()
        model.set_grad_checkpointing(again)
        routing = model.routing("depth", balance=True)
        maps = model.forward_intermediates(image((64, 64)), indices=1, routing=routing, intermediates_only=True)
        (maps[0].sum() * 0 + routing.balance).backward()
        assert routing.balance.item() > 0.01
        for block in (model.blocks[1], model.blocks[3]):
            assert block.mlp.gate[1].w_gate.grad.abs().sum() > 0
            assert block.mlp.gate[0].w_gate.grad is None


def small(**options) -> m3vit.M3ViT:
    return build("m3vit_tiny", **dict(dict(embed_dim=48, expert_hidden=24, depth=4, num_classes=3), **options))


class TestTasks:
    def test_the_call_chooses(self):
        model, x = small(), image((64, 96))
        with torch.no_grad():
            found = {task: model(x, task=task) for task in (None, *model.tasks)}
            assert not any(torch.equal(found[a], found[b]) for a, b in ((None, "depth"), ("segmentation", "depth")))
            maps = model.forward_intermediates(x, indices=1, task="depth", intermediates_only=True)
            other = model.forward_intermediates(x, indices=1, task="segmentation", intermediates_only=True)
            assert not torch.equal(maps[0], other[0])
            features = model.forward_features(x, task="depth")
            assert torch.equal(features[:, 1:], model.norm(maps[0].flatten(2).transpose(1, 2)))

    def test_a_router_is_its_tasks_alone(self):
        model, x = small(), image((64, 96))
        with torch.no_grad():
            before, depth = model(x, task="segmentation"), model(x, task="depth")
            for block in (model.blocks[1], model.blocks[3]):
                block.mlp.gate[1].w_gate.zero_()
            assert torch.equal(model(x, task="segmentation"), before)
            assert not torch.equal(model(x, task="depth"), depth)

    def test_equal_routers_are_the_single_router(self):
        """Without a task the logits are averaged, so the pretrained model, with equal routers, is the same for all."""
        model, x = small(), image((64, 96))
        with torch.no_grad():
            for block in (model.blocks[1], model.blocks[3]):
                block.mlp.gate[1].w_gate.copy_(block.mlp.gate[0].w_gate)
            torch.testing.assert_close(model(x), model(x, task="depth"))

    @pytest.mark.parametrize("router", m3vit.ROUTERS)
    def test_keep_one(self, router):
        model, x = small(router=router, task_dim=6), image((64, 96))
        with torch.no_grad():
            wanted = model(x, task="depth")
            kept = model.keep_task("depth")
            assert kept.tasks == ("depth",)
            torch.testing.assert_close(kept(x), wanted)
            torch.testing.assert_close(kept(x, task="depth"), wanted)

    @pytest.mark.parametrize(("router", "differ"), [("multi_gate", True), ("shared", False), ("task", True)])
    def test_what_a_router_knows(self, router, differ):
        model, x = small(router=router, task_dim=6), image((64, 96))
        out = [model(x, task=task) for task in model.tasks]
        assert torch.equal(*out) != differ
        out = model(x)
        out.sum().backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(tasks=()), "tasks must be different names, at least one"),
            (dict(tasks=("a", "a")), r"tasks must be different names, at least one, got \('a', 'a'\)"),
            (dict(tasks="depth"), "got 'depth'"),
            (dict(router="noisy"), "router must be one of multi_gate, shared, task, got 'noisy'"),
            (dict(top_k=17), "top_k must be 1 to the 16 experts, got 17"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(InputError, match=message):
            m3vit.M3ViT(device="meta", **options)
        with pytest.raises(InputError, match="task must be one of segmentation, depth, got 'edges'"):
            small(device="meta").routing("edges")


def official(model: m3vit.M3ViT) -> dict[str, torch.Tensor]:
    """The model's backbone under the authors' names."""
    return {theirs(n): value for n, value in model.state_dict().items() if not n.startswith(("norm", "head"))}


class TestWeights:
    def test_official_checkpoint(self):
        """A whole multi-task model: its backbone loads, norm and classifier stay, decoders are other modules."""
        source, model = small(), small()
        own = {name: value + 1 for name, value in source.state_dict().items()}
        source.load_state_dict(own)
        stored = {f"module.backbone.{name}": value for name, value in official(source).items()}
        stored["module.decoders.depth.conv_4.weight"] = torch.zeros(1, 256, 1, 1)
        head = model.head.fc.weight.clone()
        model.load_state_dict({"state_dict": stored}, strict=True)
        assert torch.equal(model.blocks[3].mlp.gate[1].w_gate, own["blocks.3.mlp.gate.1.w_gate"])
        assert torch.equal(model.stem.patches.weight, own["stem.patches.weight"])
        assert torch.equal(model.head.fc.weight, head)

    def test_a_single_router_becomes_every_tasks(self):
        source, model = small(router="shared"), small()
        model.load_state_dict(official(source), strict=True)
        for block, other in ((model.blocks[i], source.blocks[i]) for i in (1, 3)):
            assert all(torch.equal(gate.w_gate, other.mlp.gate.w_gate) for gate in block.mlp.gate)
        source.load_state_dict(official(small(router="shared")), strict=True)

    def test_deits_positions_are_resized_as_by_the_authors(self):
        source = official(small())
        source["pos_embed"] = torch.randn(1, 197, 48)
        found = m3vit.checkpoint_filter_fn(source, small())["stem.pos_embed"]
        grid = source["pos_embed"][:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
        wanted = F.interpolate(grid, size=(8, 16), mode="bilinear").flatten(2).transpose(1, 2)
        torch.testing.assert_close(found[:, 1:], wanted)
        assert torch.equal(found[:, :1], source["pos_embed"][:, :1])

    def test_files_of_edge_moe(self, tmp_path):
        """Raw files: routers are transposed, the class token is part of its position; other files are left out."""
        source = small()
        with torch.no_grad():
            source.stem.cls_token.zero_()
        files = {"image": torch.zeros(3), "l3_x_post_moe": torch.zeros(129, 48)}
        for name, value in official(source).items():
            parts = name.split(".")
            if name == "cls_token":
                continue
            if parts[0] == "blocks":
                name = f"l{parts[1]}_" + ("w_gate_T_task" + parts[4] if "w_gate" in name else "_".join(parts[-2:]))
                name = name.replace("_proj_", "_attn_proj_")
            files[name.replace("proj.", "").replace(".", "_")] = value.t() if "w_gate" in name else value
        for name, value in files.items():
            value.numpy(force=True).astype("<f4").tofile(tmp_path / f"{name}.float32.bin")
        model, x = small(), image((128, 256))
        with torch.no_grad():
            for parameter in model.blocks.parameters():
                parameter.zero_()
        read = m3vit.read_edge_moe(tmp_path)
        model.load_state_dict(read, strict=True)
        assert torch.equal(model.forward_features(x, task="depth"), source.forward_features(x, task="depth"))
        read["l1_w_gate_T_task0"] = torch.zeros(5)
        with pytest.raises(WeightsError, match="w_gate has 5 numbers in Edge-MoE's files"):
            model.load_state_dict(read, strict=True)

    def test_initialisation(self):
        """The authors': routers within 1 / sqrt(E), experts within 1 / sqrt(out * in), biases of experts 0."""
        torch.manual_seed(0)
        mixture = timm.create_model("m3vit_tiny", depth=2).blocks[1].mlp
        weight = mixture.experts.htoh4.weight
        assert weight.abs().max().item() == pytest.approx(1 / math.sqrt(384 * 192), rel=1e-3)
        assert mixture.gate[0].w_gate.abs().max().item() == pytest.approx(0.25, rel=1e-2)
        assert not mixture.experts.h4toh.bias.any()
