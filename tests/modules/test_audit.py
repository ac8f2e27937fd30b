"""What the audit sees of forwards: calls, changed weights, which layer feeds which, weights used by themselves."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_estdgm.modules._audit import ForwardAudit
from lightning_estdgm.modules._candidates import find_candidates
from lightning_estdgm.modules._weight_watch import Changes


def audited(model, *inputs, steps=1):
    audit = ForwardAudit(model, find_candidates(model, include=["*"]))
    for _ in range(steps):
        model(*inputs)
    audit.close()
    return audit


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Scaled(nn.Linear):
    """Keeps zeros: equalised learning rates, weight normalisation in the forward, weight dropout."""

    def forward(self, x):
        weight = F.dropout(self.weight * 2.0 / self.weight.norm(), 0.5)
        return F.linear(x, weight.to(x.dtype), self.bias).relu()


class Padded(nn.Conv2d):
    """Another forward around the stored weight, as of timm's Conv2dSame."""

    def forward(self, x):
        return F.conv2d(F.pad(x, [1, 1, 1, 1]), self.weight, self.bias)


class Batched(nn.Conv2d):
    """The weight as timm's StdConv2d standardises it."""

    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


@pytest.mark.parametrize(
    ("layer", "shape", "changed_by"),
    [
        (nn.Linear(4, 4), (2, 4), ""),
        (nn.Conv1d(4, 4, 3), (2, 4, 8), ""),
        (Scaled(4, 4), (2, 4), ""),
        (Padded(4, 4, 3), (2, 4, 8, 8), ""),
        (Standardised(4, 4, 3), (2, 4, 8, 8), "sub()"),
        (Batched(4, 4, 3), (2, 4, 8, 8), "batch_norm()"),
    ],
)
def test_a_forward_that_does_not_keep_the_weights_zeros_is_found(layer, shape, changed_by):
    record = audited(nn.Sequential(layer), torch.randn(shape)).records["0"]
    assert (record.called, record.changed_by) == (True, changed_by)


def test_the_layers_that_are_right_give_zeros_where_the_stored_weight_has_zeros():
    for layer, shape in ((Scaled(4, 4), (2, 4)), (Padded(4, 4, 3), (2, 4, 8, 8))):
        with torch.no_grad():
            layer.weight[:, 1] = 0
            other = torch.randn(shape)
            x = other.clone()
            x[:, 1] = 7.0  # the input that the zeros belong to
            torch.manual_seed(0)
            y = layer(x)
            torch.manual_seed(0)
            assert torch.equal(y, layer(other))


SELECTIONS = {
    "index_select": lambda w: w.index_select(0, torch.tensor([2, 0, 2])),
    "gather": lambda w: w.gather(0, torch.tensor([[1, 0, 3, 2]])),
    "take_along_dim": lambda w: torch.take_along_dim(w, torch.tensor([[1, 0, 3, 2]]), 1),
    "repeat_interleave": lambda w: w.repeat_interleave(2, 0),
    "expand_as": lambda w: w[:1].expand_as(w),
    "reshape_as": lambda w: w.reshape_as(torch.empty(8, 2)).view(4, 4),
    "cat": lambda w: torch.cat([w[2:], w[:1]]),
    "stack": lambda w: torch.stack([w, w.t()]),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_of_a_weight_keep_its_zeros(name):
    class Selecting(nn.Linear):
        def forward(self, x):
            return x @ SELECTIONS[name](self.weight).mT

    layer = Selecting(4, 4)
    assert audited(nn.Sequential(layer), torch.randn(2, 4)).records["0"].changed_by == ""
    mask = (torch.rand(4, 4) < 0.5).float()
    weight = layer.weight.detach()
    assert torch.equal(SELECTIONS[name](weight * mask), SELECTIONS[name](weight) * SELECTIONS[name](mask))


@pytest.mark.parametrize(
    ("make", "seen"),
    [(lambda w: w, ("", True)), (torch.exp, ("exp()", False)), (lambda w: w.abs() + 1.0, ("add()", False))],
)
def test_experts_that_run_under_vmap_are_followed(make, seen):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts, self.up = 2, nn.Parameter(torch.randn(2, 8, 8))

        def forward(self, x):
            return torch.func.vmap(lambda w: F.linear(x, make(w)))(self.up)

    record = audited(nn.Sequential(Experts()), torch.randn(4, 8)).records["0.up"]
    assert (record.changed_by, record.is_multiplied) == seen


@pytest.mark.parametrize(("make", "by"), [(lambda w: w.abs().sqrt(), "sqrt()"), (lambda w: w.abs() ** 0.5, "pow()")])
def test_functions_whose_slope_at_0_is_infinite_are_no_ways_to_keep_zeros(make, by):
    class Root(nn.Linear):
        def forward(self, x):
            return F.linear(x, make(self.weight))

    assert audited(nn.Sequential(Root(4, 4)), torch.randn(2, 4)).records["0"].changed_by == by


def test_a_function_by_element_is_tried_whatever_the_default_device_is():
    class Rectified(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.relu())

    layer, x = Rectified(4, 4), torch.randn(2, 4)
    with torch.device("meta"):
        record = audited(nn.Sequential(layer), x).records["0"]
    assert (record.changed_by, record.is_multiplied) == ("", True)


def test_of_weights_that_are_put_together_each_is_found_and_counted_by_its_positions():
    class Together(nn.Module):
        def __init__(self, of_all):
            super().__init__()
            self.q, self.k, self.head = (nn.Linear(4, n, bias=False) for n in (4, 8, 2))
            self.of_all = of_all

        def forward(self, x):
            return F.linear(x, self.of_all(torch.cat([self.q.weight, self.k.weight])))

    model = Together(lambda w: w)
    audit = ForwardAudit(model, find_candidates(model, include=["*"]))
    model(torch.randn(5, 7, 4))
    assert audit.used_by_themselves() == {"q": 35, "k": 35}
    with Changes([(layer.weight, audit.records[name]) for name, layer in model.named_children()]):
        model.of_all = lambda w: w.softmax(1)
        model(torch.randn(2, 4))
    assert [record.changed_by for record in audit.records.values()] == ["softmax()", "softmax()", ""]


def test_a_weight_that_is_replaced_for_a_call_is_found():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    audit = ForwardAudit(model, find_candidates(model, include=["*"]))
    noisy = {"0.weight": model[0].weight + 0.1}
    torch.func.functional_call(model, noisy, torch.randn(2, 4))
    assert audit.records["0"].changed_by == "another tensor in its place, as by functional_call"
    assert audit.records["1"].changed_by == ""


@pytest.mark.parametrize("around", [lambda f: f, torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f))])
def test_a_weight_that_shows_the_storage_of_the_layers_own_is_no_other(around):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    audit = ForwardAudit(model, find_candidates(model, include=["*"]))
    given = {name: weight.detach() for name, weight in model.named_parameters()}
    around(lambda x: torch.func.functional_call(model, given, x).square().sum())(torch.randn(3, 4))
    torch.func.grad(lambda w: torch.func.functional_call(model, w, torch.randn(3, 4)).square().sum())(given)
    assert [(record.called, record.changed_by) for record in audit.records.values()] == [(True, "")] * 2


def test_one_of_several_stacked_weights_is_another():
    model = nn.Sequential(nn.Linear(4, 4))
    audit = ForwardAudit(model, find_candidates(model, include=["*"]))
    stacked = model[0].weight.expand(3, 4, 4) + torch.randn(3, 1, 1)
    torch.func.vmap(lambda w: torch.func.functional_call(model, {"0.weight": w}, torch.ones(2, 4)))(stacked)
    assert audit.records["0"].changed_by.startswith("another tensor")


class Hypernetwork(nn.Module):
    """The output of one layer is the weight of another."""

    def __init__(self):
        super().__init__()
        self.make, self.target, self.head = nn.Linear(4, 16), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = torch.func.functional_call(self.target, {"weight": self.make(torch.ones(4)).view(4, 4)}, x)
        return x if self.head is None else self.head(x)


@pytest.mark.parametrize("headless", [False, True])
def test_a_layer_whose_output_is_the_weight_of_another_is_no_head(headless):
    model = Hypernetwork()
    if headless:
        model.head = None
    records = audited(model, torch.randn(2, 4)).records
    assert records["make"].feeds
    assert records["target"].feeds is not headless


def test_own_forwards_of_instances_are_watched_too():
    model = nn.Sequential(nn.Linear(4, 4))
    layer = model[0]
    layer.forward = lambda x: F.linear(x, torch.softmax(layer.weight, 1))
    assert audited(model, torch.randn(2, 4)).records["0"].changed_by == "softmax()"


class TwoHeads(nn.Module):
    """Registered out of the order of use, with a frozen copy behind and a residual."""

    def __init__(self):
        super().__init__()
        self.policy, self.value = nn.Linear(8, 3), nn.Linear(8, 1)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.copy = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x):
        h = x + self.second(self.first(x).relu())
        with torch.no_grad():
            self.copy(x)
        return self.policy(h), self.value(h)


def test_what_feeds_no_other_layer_is_a_head_whatever_the_order_of_registration():
    audit = audited(TwoHeads(), torch.randn(2, 8))
    assert audit.saw_graph
    feeding = {name for name, record in audit.records.items() if record.feeds}
    assert feeding == {"first", "second"}


class Direct(nn.Module):
    """Calls its layers' forwards by themselves, as PyTorch Geometric does; one of them is standardised."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), Standardised(1, 1, 3), nn.Linear(8, 8)])

    def forward(self, x):
        first, conv, last = self.layers
        return last.forward(conv.forward(first.forward(x).view(-1, 1, 8, 1).expand(-1, -1, -1, 3)).mean((1, 3)))


def test_forwards_that_are_called_by_themselves_are_seen_as_others_are():
    model = Direct()
    model.layers[1].padding = (1, 1)
    records = audited(model, torch.randn(2, 8)).records
    assert [(r.called, r.changed_by, r.feeds, r.order) for r in records.values()] == [
        (True, "", True, 0),
        (True, "sub()", True, 1),
        (True, "", False, 2),
    ]


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(3):
            x = self.cell(x).tanh()
        return x


def test_a_layer_that_feeds_only_itself_is_a_head():
    assert not audited(Cell(), torch.randn(2, 8)).records["cell"].feeds


class ByItself(nn.Module):
    """The weights of layers that are never called: whole, transposed, and in slices."""

    def __init__(self):
        super().__init__()
        self.whole, self.turned, self.sliced, self.called = (nn.Linear(6, 6, bias=False) for _ in range(4))

    def forward(self, x):
        x = F.linear(x, self.whole.weight) @ self.turned.weight.t()
        q, k = self.sliced.weight[:3], self.sliced.weight[3:]
        return self.called(torch.cat([F.linear(x, q), F.linear(x, k)], -1))


def test_weights_that_are_used_by_themselves_are_counted_by_position():
    model = ByItself()
    audit = ForwardAudit(model, find_candidates(model, include=["*"]))
    model(torch.randn(5, 7, 6))
    assert audit.used_by_themselves() == {"whole": 35, "turned": 35, "sliced": 34}  # halves are rounded down
    assert [name for name, record in audit.records.items() if record.called] == ["called"]
    audit.end_step()
    assert audit.used_by_themselves() == {}


def test_multihead_attention_computes_its_output_projection_by_itself():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    records = audited(Attention(), torch.randn(3, 2, 8)).records
    assert [(name, r.called, r.changed_by, r.feeds) for name, r in records.items()] == [
        ("attention", True, "", True),
        ("attention.out_proj", True, "", True),
        ("head", True, "", False),
    ]


def test_the_audit_leaves_nothing_behind_also_after_an_error():
    class Fails(nn.Linear):
        def forward(self, x):
            raise RuntimeError("no")

    model = nn.Sequential(nn.Linear(4, 4), Fails(4, 4))
    before = torch.overrides._get_current_function_mode_stack()
    audit = ForwardAudit(model, find_candidates(model, include=["*"]))
    with pytest.raises(RuntimeError, match="no"):
        model(torch.randn(2, 4))
    assert torch.overrides._get_current_function_mode_stack() == before
    audit.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_forwards_hide_what_the_last_layer_of_a_block_feeds_and_this_is_known(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=use_reentrant))

    model = Checkpointed()
    audit = ForwardAudit(model, find_candidates(model, include=["*"]))
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    seen = [(name, record.feeds, record.recorded) for name, record in audit.records.items()]
    assert seen == [
        ("block.0", True, not use_reentrant),
        ("block.2", not use_reentrant, not use_reentrant),
        ("head", False, True),
    ]


def test_frozen_networks_behind_the_model_end_nothing():
    class Perceptual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.output = nn.Linear(8, 8), nn.Linear(8, 8)
            self.loss = nn.Linear(8, 8).requires_grad_(False)

        def forward(self, x):
            return self.loss(self.output(self.first(x)))

    records = audited(Perceptual(), torch.randn(2, 8)).records
    assert (records["first"].feeds, records["output"].feeds) == (True, False)


class Tied(nn.Module):
    """The output is a product with the embedding, whose weight belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.last = nn.Embedding(10, 8), nn.Linear(8, 8)

    def forward(self, ids):
        return F.linear(self.last(self.embedding(ids)), self.embedding.weight)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.last, self.lstm = nn.Linear(8, 8), nn.LSTM(8, 8)

    def forward(self, x):
        return self.lstm(self.last(x))[0]


@pytest.mark.parametrize(("model", "x"), [(Tied(), torch.arange(6).view(2, 3)), (Recurrent(), torch.randn(2, 3, 8))])
def test_what_feeds_a_tied_head_or_a_recurrent_part_is_no_head(model, x):
    audit = audited(model, x)
    assert audit.records["last"].feeds
    assert audit.has_end


class Cosine(nn.Module):
    """The weight of its head is used by itself, normalised; so is that of a tied decoder, as it is or turned."""

    def __init__(self, normalise):
        super().__init__()
        self.first, self.last, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.normalise = normalise

    def forward(self, x):
        return F.linear(self.last(self.first(x).relu()), self.normalise(self.head.weight))


@pytest.mark.parametrize(
    "normalise",
    [F.normalize, lambda w: w, torch.t, lambda w: w / w.norm(dim=1, keepdim=True), lambda w: w - w.mean()],
    ids=["normalize", "as it is", "turned", "by its norm", "centred"],
)
def test_what_feeds_a_weight_that_is_used_by_itself_is_no_head(normalise):
    audit = audited(Cosine(normalise), torch.randn(2, 8))
    assert [record.feeds for record in audit.records.values()] == [True, True, False]
    assert audit.has_end


def test_the_layers_of_a_tied_autoencoder_feed_its_decoder():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.code = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            h = F.linear(self.code(self.encoder(x).relu()).relu(), self.code.weight.t()).relu()
            return F.linear(h, self.encoder.weight.t())

    assert [record.feeds for record in audited(Tied(), torch.randn(2, 8)).records.values()] == [True, True]


def test_embeddings_that_are_looked_up_are_activations_and_not_weights():
    """A cell that is fed with them, and feeds itself alone, is a head all the same."""

    class Reader(Cell):
        def __init__(self):
            super().__init__()
            self.embedding, self.places = nn.Embedding(4, 8), nn.Parameter(torch.randn(2, 8))

        def forward(self, x):
            return super().forward(self.embedding(x) + self.places)

    audit = audited(Reader(), torch.tensor([0, 3]))
    assert not audit.records["cell"].feeds


def test_outputs_that_are_fed_back_leave_no_end():
    class Feedback(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.output = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            for _ in range(3):
                x = self.output(self.cell(x).tanh())
            return x

    assert not audited(Feedback(), torch.randn(2, 8)).has_end


class Adapted(nn.Module):
    """A frozen layer with an adapter beside it."""

    def __init__(self, width=8):
        super().__init__()
        self.base, self.a, self.b = nn.Linear(width, width), nn.Linear(width, 2), nn.Linear(2, width)
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def test_what_feeds_frozen_layers_only_is_told_from_what_feeds_none():
    model = nn.Sequential(Adapted(), nn.ReLU(), Adapted(), nn.ReLU(), nn.Linear(8, 8).requires_grad_(False))
    records = audited(model, torch.randn(2, 8)).records
    fed = {name: (record.feeds, record.feeds_frozen) for name, record in records.items()}
    assert fed == {
        "0.base": (False, False),  # nothing before it trains, so autograd does not record it
        "0.a": (True, True),
        "0.b": (True, True),
        "2.base": (False, True),
        "2.a": (True, True),
        "2.b": (False, True),
        "4": (False, False),
    }
