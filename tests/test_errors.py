"""Bad arguments raise what torch raises, and are told what was expected and what came."""

import pytest
import torch

import normops
import normops.functional as F

OPS = torch.ops.normops
X = torch.randn(4, 6, 5)
SIX, FIVE = torch.ones(6), torch.ones(5)
META = torch.ones(6, device="meta")
TRAINING = {"running_mean": None, "running_var": None, "training": True}
STATS = {"running_mean": SIX, "running_var": SIX}
ROW = {"normalized_shape": (5,)}
# Enough keyword arguments for a call that is right.
RIGHT = {
    "batch_norm": TRAINING,
    "instance_norm": {},
    "group_norm": {"num_groups": 3},
    "layer_norm": ROW,
    "rms_norm": ROW,
}
CHANNEL_OPS = ["batch_norm", "instance_norm", "group_norm"]
ROW_OPS = ["layer_norm", "rms_norm"]


def bad(op, what, kwargs, *told, error=None):
    """The right call but for ``kwargs``, and what its message has to say.

    ``error`` is for where torch accepts the call, or fails at it by accident, with an error that hides the cause.
    """
    return pytest.param(op, {"input": X, **RIGHT[op], **kwargs}, told, error, id=f"{op}-{what}")


TABLE = [
    *(bad(op, "integers", {"input": X.int()}, "input of dtype float", "Int") for op in RIGHT),
    *(
        bad(op, "complex", {"input": X.cfloat()}, "input of dtype float", "ComplexFloat", error=NotImplementedError)
        for op in RIGHT
    ),
    *(
        bad(op, "sparse", {"input": X.to_sparse()}, "input with strided layout", "Sparse", error=NotImplementedError)
        for op in RIGHT
    ),
    *(bad(op, "array", {"input": [1.0]}, "input of type Tensor, got list of float", error=TypeError) for op in RIGHT),
    *(bad(op, "string as eps", {"eps": "1"}, "eps of type float", "got str", error=TypeError) for op in RIGHT),
    *(
        bad(op, "nothing as eps", {"eps": None}, "eps of type float, got NoneType", error=TypeError)
        for op in [*CHANNEL_OPS, "layer_norm"]
    ),
    *(
        bad(op, "string as momentum", {"momentum": "1"}, "momentum of type float, got str", error=TypeError)
        for op in CHANNEL_OPS[:2]
    ),
    *(
        bad(op, f"string as {flag}", {flag: "yes"}, f"{flag} of type bool, got str", error=TypeError)
        for op, flag in (("batch_norm", "training"), ("instance_norm", "use_input_stats"))
    ),
    *(bad(op, "number as weight", {"weight": 1.0}, "weight of type Tensor or None, got float") for op in RIGHT),
    bad("group_norm", "float as num_groups", {"num_groups": 3.0}, "num_groups of type int, got float"),
    *(
        bad(
            op,
            f"channels of input, {' and '.join(names)}",
            dict.fromkeys(names, FIVE),
            f"input with 5 channels ({argument}; the size of {', '.join(names)}), got input of shape [4, 6, 5]",
        )
        for op, argument in zip(CHANNEL_OPS, ["num_features", "num_features", "num_channels"], strict=True)
        for names in (["weight", "bias"], ["running_mean", "running_var"], ["weight", "bias", *STATS])
        if op != "group_norm" or names == ["weight", "bias"]
    ),
    *(bad(op, "weight shape", {"weight": FIVE}, "weight of shape [6]", "channels", "got [5]") for op in CHANNEL_OPS),
    *(bad(op, "bias shape", {"bias": FIVE}, "bias of shape [6]", "channels", "got [5]") for op in CHANNEL_OPS),
    *(bad(op, "weight shape", {"weight": SIX}, "weight of shape [5]", "normalized_shape", "got [6]") for op in ROW_OPS),
    bad("layer_norm", "bias shape", {"bias": SIX}, "bias of shape [5]", "normalized_shape", "got [6]"),
    *(
        bad(op, f"{name} on another device", {name: META}, f"{name} on the device of input (cpu)", "got meta")
        for op in CHANNEL_OPS
        for name in ("weight", "bias")
    ),
    *(
        bad(op, "weight on another device", {"weight": torch.ones(5, device="meta")}, "weight", "cpu", "got meta")
        for op in ROW_OPS
    ),
    *(
        bad(op, "integer weight", {"weight": SIX.int()}, "weight to be a strided tensor of floating dtype", "got Int")
        for op in CHANNEL_OPS
    ),
    *(bad(op, "one dimension", {"input": SIX}, "at least 2 dimensions", "got shape [6]") for op in CHANNEL_OPS),
    *(bad(op, "no dimension", {"input": SIX[0]}, "at least 2 dimensions", "got shape []") for op in CHANNEL_OPS),
    *(
        bad(op, "one dimension in evaluation", {"input": SIX, **STATS, flag: False}, "at least 2 dimensions", "[6]")
        for op, flag in (("batch_norm", "training"), ("instance_norm", "use_input_stats"))
    ),
    bad("batch_norm", "one dimension and statistics", {"input": SIX, **STATS}, "at least 2 dimensions", "[6]"),
    # group_norm
    bad("group_norm", "indivisible", {"num_groups": 4}, "num_groups to divide the channels", "4 groups", "[4, 6, 5]"),
    bad("group_norm", "no groups", {"num_groups": 0}, "num_groups > 0, got 0", error=RuntimeError),
    bad("group_norm", "negative groups", {"num_groups": -1}, "num_groups > 0, got -1", error=RuntimeError),
    bad("group_norm", "one value", {"input": X[:1, :3, :1]}, "more than 1 value per group", "[1, 3, 1] in 3 groups"),
    # layer_norm, rms_norm
    *(
        bad(op, "shape", {"normalized_shape": (6,)}, "ends in [6] (normalized_shape)", "got [4, 6, 5]")
        for op in ROW_OPS
    ),
    *(
        bad(op, "no shape", {"normalized_shape": ()}, "normalized_shape with at least one entry", "[]")
        for op in ROW_OPS
    ),
    *(
        bad(
            op,
            "long shape",
            {"normalized_shape": (1, 4, 6, 5)},
            "ends in [1, 4, 6, 5]",
            "got [4, 6, 5]",
            error=RuntimeError,
        )
        for op in ROW_OPS
    ),
    *(
        bad(op, f"{type(shape).__name__} as shape", {"normalized_shape": shape}, "tuple", type(shape).__name__)
        for op in ROW_OPS
        for shape in (5, torch.tensor([5]), range(5, 6), iter([5]))
    ),
    *(
        bad(op, "floats as shape", {"normalized_shape": (5.0,)}, "normalized_shape of type tuple of ints", "of float")
        for op in ROW_OPS
    ),
    # batch_norm
    bad("batch_norm", "evaluation", {"training": False}, "running_mean and running_var in evaluation", "got None"),
    bad("batch_norm", "one value", {"input": X[:1, :, :1]}, "more than 1 value per channel", "shape [1, 6, 1]"),
    bad("batch_norm", "zero eps", {"eps": 0.0}, "eps > 0 in training, got 0"),
    bad("batch_norm", "negative eps", {"eps": -1.0}, "eps > 0 in training, got -1"),
    bad("batch_norm", "negative eps in evaluation", {**STATS, "training": False, "eps": -1.0}, "eps >= 0, got -1"),
    # instance_norm
    bad("instance_norm", "one position", {"input": X[..., :1]}, "more than 1 spatial element", "shape [4, 6, 1]"),
    bad("instance_norm", "evaluation", {"use_input_stats": False}, "running_mean and running_var", "got None"),
    # running statistics
    *(
        bad(
            op,
            f"only {name}",
            {"running_mean": None, "running_var": None, name: SIX},
            "both given",
            f"only {name}",
            error=ValueError,
        )
        for op in CHANNEL_OPS[:2]
        for name in STATS
    ),
    *(
        bad(op, f"{name} shape", {**STATS, name: FIVE}, f"{name} of shape [6]", "channels", "got [5]")
        for op in CHANNEL_OPS[:2]
        for name in STATS
    ),
    *(
        bad(op, f"{name} on another device", {**STATS, name: META}, f"{name} on the device of input", "got meta")
        for op in CHANNEL_OPS[:2]
        for name in STATS
    ),
    *(
        bad(
            op,
            f"{name} with requires_grad",
            {**STATS, name: SIX.clone().requires_grad_()},
            f"{name} without",
            error=RuntimeError,
        )
        for op in CHANNEL_OPS[:2]
        for name in STATS
    ),
]


@pytest.mark.parametrize(("op", "kwargs", "told", "error"), TABLE)
def test_bad_arguments(op, kwargs, told, error):
    if error is None:
        with pytest.raises(Exception) as theirs:
            getattr(torch.nn.functional, op)(**kwargs)
        error = theirs.type
    with pytest.raises(error) as ours:
        getattr(F, op)(**kwargs)
    for part in (op, *told):
        assert part in str(ours.value)


@pytest.mark.parametrize("op", RIGHT)
def test_right_arguments(op):
    """The calls that the table spoils are right themselves."""
    getattr(F, op)(X, **RIGHT[op])


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_wrong_number_of_features(options):
    """Said of the input, in the words of the layer's constructor."""
    message = r"batch_norm: expected input with 8 channels \(num_features; .*\), got input of shape \[2, 4, 3, 3\]"
    with pytest.raises(RuntimeError, match=message):
        normops.BatchNorm2d(8, **options)(torch.randn(2, 4, 3, 3))


def test_nothing_moves_before_the_checks():
    mean, var = torch.zeros(6), torch.ones(6)
    with pytest.raises(RuntimeError):
        F.batch_norm(X, mean, var, weight=FIVE, training=True)
    assert mean.eq(0).all() and var.eq(1).all()


# The private operators are open to anyone: whatever they are given, they have to stay inside their memory.

MASK = [True, True, True, False]
ROWS = torch.ones(4, 6, 1, dtype=torch.float64)
CHANNELS = torch.ones(6, dtype=torch.float64)
PRIVATE = {
    "_row_norm": {
        "right": (X, 1, None, None, 1e-5, True),
        "channels of a vector": (X.flatten(), 0, None, None, 1e-5, True),
        "normalized_ndim 4": (X, 4, None, None, 1e-5, True),
        "negative normalized_ndim": (X, -1, None, None, 1e-5, True),
        "weight": (X, 1, SIX, None, 1e-5, True),
        "bias": (X, 1, None, SIX, 1e-5, True),
        "dtype": (X.int(), 1, None, None, 1e-5, True),
    },
    "_row_norm_backward": {
        "right": (X, X, 1, ROWS, ROWS, None, 1e-5, True, MASK),
        "gradient": (X[:3], X, 1, ROWS, ROWS, None, 1e-5, True, MASK),
        "gradient dtype": (X.double(), X, 1, ROWS, ROWS, None, 1e-5, True, MASK),
        "normalized_ndim": (X, X, 4, ROWS, ROWS, None, 1e-5, True, MASK),
        "mean": (X, X, 1, ROWS[:3], ROWS, None, 1e-5, True, MASK),
        "rstd": (X, X, 1, ROWS, ROWS[:3], None, 1e-5, True, MASK),
        "weight": (X, X, 1, ROWS, ROWS, SIX, 1e-5, True, MASK),
    },
    "_row_norm_backward_": {
        "right": (X.clone(), X, 1, ROWS, ROWS, None, 1e-5, True, MASK),
        "gradient": (X[:3].clone(), X, 1, ROWS, ROWS, None, 1e-5, True, MASK),
        "gradient dtype": (X.double(), X, 1, ROWS, ROWS, None, 1e-5, True, MASK),
        "transposed gradient": (X.mT.clone(), X.mT, 1, ROWS, ROWS, None, 1e-5, True, MASK),
        "expanded gradient": (X[:1].clone().expand_as(X), X, 1, ROWS, ROWS, None, 1e-5, True, MASK),
        "gradient with a gradient": (X.clone().requires_grad_(), X, 1, ROWS, ROWS, None, 1e-5, True, MASK),
        "gradient in the input": (X, X, 1, ROWS, ROWS, None, 1e-5, True, MASK),
        "channels of a transposed gradient": (X.mT.contiguous().mT, X, 0, ROWS.mT, ROWS.mT, None, 1e-5, True, MASK),
    },
    "_channel_norm": {
        "right": (X, None, None, None, None, 6, True, 1e-5),
        "one dimension": (X[0, 0], None, None, None, None, 5, True, 1e-5),
        "indivisible": (X, None, None, None, None, 4, False, 1e-5),
        "no groups": (X, None, None, None, None, 0, False, 1e-5),
        "negative groups": (X, None, None, None, None, -1, False, 1e-5),
        "groups over the batch": (X, None, None, None, None, 3, True, 1e-5),
        "only mean": (X, SIX, None, None, None, 6, True, 1e-5),
        "only var": (X, None, SIX, None, None, 6, True, 1e-5),
        "mean": (X, FIVE, SIX, None, None, 6, True, 1e-5),
        "var": (X, SIX, FIVE, None, None, 6, True, 1e-5),
        "weight": (X, None, None, FIVE, None, 6, True, 1e-5),
        "bias": (X, None, None, None, FIVE, 6, True, 1e-5),
        "dtype": (X.int(), None, None, None, None, 6, True, 1e-5),
    },
    "_channel_norm_backward": {
        "right": (X, X, CHANNELS, CHANNELS, None, 6, True, 1e-5, True, MASK),
        "gradient": (X[:3], X, CHANNELS, CHANNELS, None, 6, True, 1e-5, True, MASK),
        "gradient dtype": (X.half(), X, CHANNELS, CHANNELS, None, 6, True, 1e-5, True, MASK),
        "indivisible": (X, X, CHANNELS, CHANNELS, None, 4, True, 1e-5, True, MASK),
        "no groups": (X, X, CHANNELS, CHANNELS, None, 0, True, 1e-5, True, MASK),
        "groups over the batch": (X, X, CHANNELS[:3], CHANNELS[:3], None, 3, True, 1e-5, True, MASK),
        "mean": (X, X, CHANNELS[:5], CHANNELS, None, 6, True, 1e-5, True, MASK),
        "var": (X, X, CHANNELS, CHANNELS[:5], None, 6, True, 1e-5, True, MASK),
        "statistics per sample": (X, X, CHANNELS, CHANNELS, None, 6, False, 1e-5, True, MASK),
        "weight": (X, X, CHANNELS, CHANNELS, FIVE, 6, True, 1e-5, True, MASK),
    },
    "_channel_norm_backward_": {
        "right": (X.clone(), X, CHANNELS, CHANNELS, None, 6, True, 1e-5, True, MASK),
        "gradient": (X[:3].clone(), X, CHANNELS, CHANNELS, None, 6, True, 1e-5, True, MASK),
        "gradient dtype": (X.half(), X, CHANNELS, CHANNELS, None, 6, True, 1e-5, True, MASK),
        "transposed gradient": (X.mT.contiguous().mT, X, CHANNELS, CHANNELS, None, 6, True, 1e-5, True, MASK),
        "expanded gradient": (X[:1].clone().expand_as(X), X, CHANNELS, CHANNELS, None, 6, True, 1e-5, True, MASK),
    },
    "_channel_moments": {
        "right": (X,),
        "one dimension": (X[0, 0],),
        "dtype": (X.int(),),
    },
    "_merge_moments": {
        "right": (CHANNELS, torch.ones(6, 4), torch.ones(6, 4)),
        "count": (CHANNELS[:5], torch.ones(6, 4), torch.ones(6, 4)),
        "var": (CHANNELS, torch.ones(6, 4), torch.ones(6, 3)),
        "one dimension": (CHANNELS, CHANNELS, CHANNELS),
    },
    "_channel_grad_sums": {
        "right": (X, X, CHANNELS, CHANNELS, 1e-5),
        "gradient": (X[:3], X, CHANNELS, CHANNELS, 1e-5),
        "gradient dtype": (X.half(), X, CHANNELS, CHANNELS, 1e-5),
        "one dimension": (X[0, 0], X[0, 0], CHANNELS, CHANNELS, 1e-5),
        "mean": (X, X, CHANNELS[:5], CHANNELS, 1e-5),
        "var": (X, X, CHANNELS, CHANNELS[:5], 1e-5),
    },
    "_channel_grad_apply": {
        "right": (X, X, CHANNELS, CHANNELS, None, CHANNELS, CHANNELS, 20, 1e-5),
        "gradient": (X[:3], X, CHANNELS, CHANNELS, None, CHANNELS, CHANNELS, 20, 1e-5),
        "mean": (X, X, CHANNELS[:5], CHANNELS, None, CHANNELS, CHANNELS, 20, 1e-5),
        "var": (X, X, CHANNELS, CHANNELS[:5], None, CHANNELS, CHANNELS, 20, 1e-5),
        "weight": (X, X, CHANNELS, CHANNELS, FIVE, CHANNELS, CHANNELS, 20, 1e-5),
        "sum_dy": (X, X, CHANNELS, CHANNELS, None, CHANNELS[:5], CHANNELS, 20, 1e-5),
        "sum_dy_xhat": (X, X, CHANNELS, CHANNELS, None, CHANNELS, CHANNELS[:5], 20, 1e-5),
        "count": (X, X, CHANNELS, CHANNELS, None, CHANNELS, CHANNELS, 0, 1e-5),
    },
    "_channel_norm_tracked": {
        "right": (X, SIX.clone(), SIX.clone(), None, None, True, 0.1, 1e-5),
        "running_mean": (X, FIVE.clone(), SIX.clone(), None, None, True, 0.1, 1e-5),
        "running_var": (X, SIX.clone(), FIVE.clone(), None, None, True, 0.1, 1e-5),
        "weight": (X, SIX.clone(), SIX.clone(), CHANNELS[:5], None, True, 0.1, 1e-5),
        "bias": (X, SIX.clone(), SIX.clone(), None, CHANNELS[:5], False, 0.1, 1e-5),
        "dtype": (X, SIX.int(), SIX.int(), None, None, True, 0.1, 1e-5),
        "empty": (X[:0], SIX.clone(), SIX.clone(), None, None, True, 0.1, 1e-5),
    },
    "_update_running_stats": {
        "right": (SIX.clone(), SIX.clone(), CHANNELS, CHANNELS, 0.1, 20),
        "running_mean": (FIVE.clone(), SIX.clone(), CHANNELS, CHANNELS, 0.1, 20),
        "running_var": (SIX.clone(), FIVE.clone(), CHANNELS, CHANNELS, 0.1, 20),
        "mean": (SIX.clone(), SIX.clone(), CHANNELS[:5], CHANNELS, 0.1, 20),
        "var": (SIX.clone(), SIX.clone(), CHANNELS, CHANNELS[:5], 0.1, 20),
        "no dimension": (torch.tensor(1.0), torch.tensor(1.0), CHANNELS[0], CHANNELS[0], 0.1, 20),
        "dtype": (SIX.int(), SIX.int(), CHANNELS, CHANNELS, 0.1, 20),
    },
}


@pytest.mark.parametrize(
    ("op", "what"), [pytest.param(op, what, id=f"{op}-{what}") for op, calls in PRIVATE.items() for what in calls]
)
def test_private_operators(op, what):
    call = getattr(OPS, op)
    if what == "right":
        call(*PRIVATE[op][what])
        return
    with pytest.raises(RuntimeError):
        call(*PRIVATE[op][what])
