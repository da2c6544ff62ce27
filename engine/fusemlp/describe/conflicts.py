"""Features of a training that do not go together: one table, asked when an engine, a fleet or a fit's plan is made.

Descriptions say which features they use (``uses``), each by its name and with the value that a row's words show. The
backend and the precision are features by their names.
"""

from collections.abc import Mapping
from typing import Any

from fusemlp_kernels.errors import ArgumentError, BackendUnavailableError

Features = Mapping[str, Any]

# Said of a feature that a network with members does not have.
_SINGLE_MEND = "make it with members=1, or by train --preset plain"
SINGLE = f" takes a network without members, and this one has {{members}}; {_SINGLE_MEND}"
_DRAWN = "the engine trains privately; each step draws its rows at random; leave it out"
_ONE_BATCH = "privacy clips the gradient of each row and takes one batch a step; leave it out, got"
_FOR_ARRAYS = "it is for arrays X and y, and without y X yields batches"
_CORE, _OTHERS = "the cupy backend has no kernels for", "; use backend='triton' or 'numpy'"
_HOST = "is not supported yet"
_WITHOUT_LOSS = (("numpy loss", "triton"), ("numpy loss", "cupy"), ("function", "cupy"))
_STEADY = "lbfgs needs the same loss at each evaluation,"
# In words of a plan with a kernel of its own.
_DROPS_NOTHING = "drops nothing so far"
_PLAIN_STEPS = {
    "prelu": "learns no slope of prelu",
    "adversarial": "trains on batches as they are",
    "accumulate": "takes one batch an update",
}
_MANY_STEPS = {
    "clip_norm": "takes no norm of the gradients",
    "ema": "keeps no average",
    "ranks": "trains on one card",
}

# By two features the argument, the reason and the mend; the first row whose features are both in use decides.
CONFLICTS = {
    ("members", "prelu"): "members: prelu's slope belongs to a whole layer, got members={members}; use leaky_relu",
    ("members", "no hidden layer"): "members: members share hidden layers, so add one: MLP([8, 64, 2])",
    ("members", "output activation"): "output_activation: with members it must be 'identity', got "
    "{output activation!r}",
    ("members", "sum"): "reduction: the loss of {members} members is the mean of theirs; expected 'mean', got {sum!r}",
    ("members", "fleet"): f"net: a fleet{SINGLE}",
    ("members", "probe"): f"layers: a probe{SINGLE}",
    ("members", "bounds"): f"{{bounds}}: interval bounds{SINGLE}",
    # normalisation and residual blocks
    **{
        (feature, other): words
        for feature, argument, what in (("norm", "norm", "normalised layers"), ("residual", "sizes", "residual blocks"))
        for other, words in {
            "members": f"{argument}: members share no {what} so far; {_SINGLE_MEND}",
            "prelu": f"{argument}: prelu's slope is not learned beside {what}; use leaky_relu",
            "privacy": f"{argument}: private training clips each row's gradient, and has none for {what}; leave "
            "privacy out",
            "IBP": f"{argument}: interval bounds do not go through {what}; train against PGD(eps)",
            "cupy": f"{argument}: {_CORE} {what}{_OTHERS}",
            "bounds": f"{{bounds}}: interval bounds do not go through {what}; use an attack, PGD(eps)",
            "models": f"models: {{models}} networks with {what} cannot be merged; train a single model",
        }.items()
    },
    # the encoding of inputs
    **{
        ("encoding", other): f"encoding: {words}"
        for other, words in {
            "cupy": f"{_CORE} inputs as waves{_OTHERS}",
            "columns": "waves of coded columns tell 0 from 1 and no more; give rows of numbers, or leave it out",
            "adversarial": "training against attacks takes the inputs as they are; leave adversarial out",
            "bounds": "interval bounds ({bounds}) do not go through waves; use an attack, PGD(eps)",
        }.items()
    },
    ("residual", "FusedMLP"): "sizes: FusedMLP is a chain of layers; add within your module, x + FusedMLP(...)(x)",
    ("residual", "hidden"): "hidden: {hidden!r} cannot replace the widths of residual blocks; vary other parameters",
    ("prelu", "models"): "models: {models} networks with prelu cannot be merged; use leaky_relu, or a single model",
    # the fallback on a card has the core alone
    ("members", "cupy"): f"members: {_CORE} members that share weights{_OTHERS}",
    ("privacy", "cupy"): f"privacy: {_CORE} clipped rows and noise{_OTHERS}",
    ("attack", "cupy"): f"adversarial: {_CORE} attacks inside a training step{_OTHERS}",
    # several processes
    ("ranks", "cupy"): "{ranks}: the cupy backend trains in one process so far; use backend='triton' or 'numpy'",
    ("ranks", "eager host"): "plan: a distributed step is two launches with a collective between them, got 'eager'; "
    "leave plan out",
    ("ranks", "resident kernel"): "plan: the resident kernel trains on one card, without a collective between its "
    "steps, got 'resident'; leave plan out",
    ("ranks", "privacy"): "privacy: a private engine trains in one process so far; leave distributed out",
    ("ranks", "members"): f"{{ranks}}: training on several processes{SINGLE}",
    ("ranks", "step"): "step: a distributed engine trains in fit, which splits the rows; use fit",
    ("ranks", "models"): "models: several processes train one model together, got {models}; give --models 1",
    ("ranks", "time_limit"): "time_limit: each process would decide by its own time; leave it out, and give --epochs",
    ("ranks", "final_fit"): "final_fit: it is for a training in one process; leave it out",
    # plans that leave something out: forward and back as one launch, many steps on the whole card, or by model
    **{
        (feature, f"{plan} plan"): f"plan: the {plan} kernel {words}, got {plan!r}; use plan='auto'"
        for plan, features in {
            "narrow": {
                "members": "trains one network, without members",
                "norm": "has no normalised layers",
                "residual": "has no residual blocks",
                "encoding": "takes the inputs as they are",
                "dropout": _DROPS_NOTHING,
                "function": "calls no function between its launches",
                "privacy": "clips no gradient of a row",
                "clip_norm": "leaves sums whose norm no launch takes",
                "ranks": "has no collective between its two launches",
            },
            "card": _MANY_STEPS,
            "chip": {**_MANY_STEPS, "dropout": _DROPS_NOTHING},
        }.items()
        for feature, words in {**_PLAIN_STEPS, **features}.items()
    },
    # targets of tables
    ("return_std", "quantiles"): "return_std: the loss quantiles learns no deviation; use predict_quantiles, or train "
    "with the loss gaussian",
    ("several targets", "quantiles"): "loss: quantiles learns one target, and there are {several targets}; train a run "
    "for each, or use gaussian or quantile",
    **{
        (gaps, other): f"{argument}: {words} rows with all targets, and some are missing: {{{gaps}}}; {mend}"
        for gaps, other, argument, words, mend in (
            ("trained gaps", "fleet", "models", "several models take", "leave it out, or fill them in"),
            ("trained gaps", "sweep", "vary", "the models of a sweep take", "fill them in"),
            ("gaps", "members", "preset", "members that share weights take", "leave it out, or fill them in"),
            ("gaps", "privacy", "dp_epsilon", "private training takes", "leave it out, or fill them in"),
            ("gaps", "adversarial", "adversarial", "adversarial training takes", "leave it out, or fill them in"),
        )
    },
    ("dp_epsilon", "adversarial"): "dp_epsilon: adversarial training is not private; leave out --dp-epsilon or "
    "--adversarial",
    ("probed", "time_limit"): "probe: --time-limit does not count its epochs; give one of the options",
    ("probed", "dp_epsilon"): "probe: it trains without noise, and --dp-epsilon needs noise; use --freeze in its place",
    # a loss of the whole batch, which may be a function of the caller's, or of the numpy backend alone
    ("batch loss", "members"): f"loss: {{batch loss}}{SINGLE}",
    ("function", "table"): f"loss: {{function}} {_HOST} for tables; train an Engine on their columns as numbers",
    (
        "missing",
        "estimator",
    ): "loss: {missing} is for gaps in y, which scikit-learn's checks refuse; use TableRegressor or Engine",
    (
        "batch loss",
        "label_smoothing",
    ): "label_smoothing: {batch loss} gets whole classes; leave it 0, and smooth in the loss",
    ("batch loss", "privacy"): f"loss: {{batch loss}} {_HOST} with privacy, since its gradient is of the batch, not of "
    "each row",
    (
        "batch loss",
        "loss by inputs",
    ): "y: {batch loss} has no gradient by the inputs of each row; leave y out for that of an output",
    **{
        (loss, name): f"loss: {{{loss}}} {_HOST} on the backend {name!r}; make the engine with backend='numpy'"
        for loss, name in _WITHOUT_LOSS
    },
    # privacy
    ("privacy", "members"): f"privacy: private training{SINGLE}",
    ("privacy", "fp16"): "precision: fp16 skips batches whose gradients overflow, which privacy does not cover; use "
    "fp32 or bf16",
    ("privacy", "prelu"): "privacy: prelu's slopes have no gradient for each row here; use leaky_relu",
    ("privacy", "sum"): "privacy: it divides the gradients by batch_size, so the reduction must be 'mean', got {sum!r}",
    ("privacy", "clip_norm"): f"clip_norm: {_ONE_BATCH} {{clip_norm!r}}",
    ("privacy", "accumulate"): f"accumulate: {_ONE_BATCH} {{accumulate!r}}",
    ("privacy", "measured rows"): "normalise: True measures the private rows, which privacy does not cover; give rows "
    "that are public, normalise=X_public, or scale by bounds that are known",
    ("privacy", "step"): "step: a private engine draws the rows of each step at random from all; use fit",
    ("privacy", "lr_find"): "engine: the sweep's losses are of the private rows, which privacy does not cover; sweep "
    "rows that need no protection with an engine without privacy",
    ("privacy", "probe"): "privacy: a probe trains without noise; freeze the first layers in its place (by_layers)",
    ("privacy", "batches"): "y: the engine trains privately; give arrays X and y: each step draws its rows at random "
    "from all",
    ("privacy", "rows in turn"): f"shuffle: {_DRAWN}",
    ("privacy", "row_order"): f"row_order: {_DRAWN}",
    ("privacy", "drop_last"): "drop_last: the engine trains privately; its batches have no common length; leave it out",
    ("privacy", "balanced"): "class_weight: 'balanced' counts the private rows, which privacy does not cover; give the "
    "weight of each class",
    ("privacy", "followed rows"): "monitor: {followed rows!r} is of the private rows, which privacy does not cover; "
    "give validation_data=(Xv, yv) of rows that need no protection, and follow val_loss",
    # training against attacks, and with interval bounds
    ("adversarial", "members"): f"adversarial: adversarial training{SINGLE}",
    ("adversarial", "privacy"): "adversarial: the engine trains privately; leave out privacy or adversarial",
    ("adversarial", "ranks"): "adversarial: it trains in one process so far; leave out distributed or adversarial",
    ("adversarial", "batches"): "y: adversarial training takes arrays X and y, not batches; give both",
    ("adversarial", "resident kernel"): "plan: the resident kernel trains on batches as they are; use plan='auto'",
    ("adversarial", "probe"): "adversarial: a probe sees features, and attacks change inputs; give it to the fit after "
    "it",
    ("adversarial", "lbfgs"): f"adversarial: {_STEADY} and attacks change it. Use solver='adam'.",
    ("attack", "normalise"): "adversarial: eps would be in the units of the scaled columns, and that of attack is in "
    "raw ones; scale X yourself, and make the engine with normalise=False",
    ("IBP", "one label"): "adversarial: IBP takes more than two classes; use PGD or FGSM",
    ("IBP", "falling activation"): "adversarial: IBP takes activations that rise everywhere, and {falling activation}; "
    "use relu, leaky_relu, elu or softplus",
    ("IBP", "dropout"): "adversarial: IBP takes no dropout, and the network has {dropout}; leave it out",
    ("IBP", "no classes"): "adversarial: IBP needs the loss cross_entropy, this engine has {no classes!r}",
    ("IBP", "accumulate"): "accumulate: IBP takes one batch an update, got {accumulate}; use a larger batch_size",
    **{
        ("IBP", name): f"backend: IBP trains on the backend 'numpy', this engine has {name!r}; make it with "
        "backend='numpy', or train against PGD(eps)"
        for name in ("triton", "cupy")
    },
    ("IBP", "partial_fit"): "adversarial: IBP rises over the epochs of a fit, and partial_fit trains one. Use fit.",
    # batches that come one by one
    ("batches", "sample_weight"): f"sample_weight: {_FOR_ARRAYS}; let them be (x, y, sample_weight)",
    ("batches", "validation_split"): f"validation_split: {_FOR_ARRAYS}; give validation_data",
    ("batches", "batch_size"): f"batch_size: {_FOR_ARRAYS}; it is that of the batches; set it where they are made",
    ("batches", "row_order"): f"row_order: {_FOR_ARRAYS}; they come in their own order",
    ("batches", "drop_last"): f"drop_last: {_FOR_ARRAYS}; leave the last one out where they are made",
    ("batches", "balanced"): "class_weight: 'balanced' needs all training rows at once, and batches come one by one; "
    "give the weight of each class",
    ("batches", "probe"): "X: a probe computes the outputs of all rows once; give arrays X and y, not batches",
    ("arrays", "steps_per_epoch"): "steps_per_epoch: an epoch goes through all rows of X, in batches of batch_size; it "
    "is for batches, fit(batches, steps_per_epoch=...), got {steps_per_epoch!r}",
    ("validation_split", "validation_data"): "validation_split: validation_data has the validation rows already; give "
    "one of the two",
    # scikit-learn's solvers and single steps
    ("partial_fit", "early_stopping"): "partial_fit does not support early_stopping=True",
    ("lbfgs", "dropout"): f"dropout: {_STEADY} got {{dropout!r}}. Use solver='adam'.",
    ("lbfgs", "fast products"): "precision: lbfgs needs 'fp32' or 'fp64', got {fast products!r}.",
}
# By these rows "auto" passes over a backend.
PASSED_OVER = {
    **CONFLICTS,
    ("function", "triton"): "loss: {function} gets NumPy arrays; ask for tensors by backend='triton'",
}
# The rows that name what a backend does not have.
UNAVAILABLE = {
    *(pair for pair, words in CONFLICTS.items() if _CORE in words),
    *(("ranks", "cupy"), *_WITHOUT_LOSS),
}
# Features that a resident kernel may lack, in the words of its refusal.
BLOCKS = "norm and residual blocks"
BESIDE = {
    **{"privacy": "privacy", "members": "members", "norm": BLOCKS, "residual": BLOCKS, "encoding": "encoded inputs"},
    "function": "a loss of the caller's",
}


def in_use(**features: Any) -> dict[str, Any]:
    """Return the features that are in use: those with a value but None and False."""
    return {name: value for name, value in features.items() if value is not None and value is not False}


def refused_by(features: Features, backend: str) -> str | None:
    """Return why "auto" passes over a backend for these features; None if it does not."""
    return next(iter(obstacles_to(backend, features, PASSED_OVER).values()), None)


def obstacles_to(name: str, features: Features, rows: Mapping[tuple[str, str], str] = CONFLICTS) -> dict[str, str]:
    """Return the errors of those of the features that do not go with the one called ``name``."""
    others = {({*pair} - {name}).pop(): words for pair, words in rows.items() if name in pair}
    return {other: others[other].format_map(features) for other in others if other in features}


def check_together(features: Features) -> None:
    """Raise ArgumentError or BackendUnavailableError by the first row of ``CONFLICTS`` whose features are in use."""
    for pair, words in CONFLICTS.items():
        if pair[0] in features and pair[1] in features:
            error = BackendUnavailableError if pair in UNAVAILABLE else ArgumentError
            raise error(words.format_map(features))
