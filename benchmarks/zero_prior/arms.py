"""The ways of naming a new object that the zero-prior experiment compares."""

from dataclasses import dataclass, replace

from examples import demo, shapes

SECOND_TOKEN = "<zwy>"
RARE_WORD = "ohwx"  # no caption of the small model's pretraining holds any of its four tokens
# What a prompt guide would have users write: the object in words that the model knows.
PHRASES = {
    "house": shapes.Prompt("square", "yellow", part=shapes.Part("triangle", "green", "above")),
    "mushroom": shapes.Prompt("circle", "red", part=shapes.Part("square", "white", "below")),
    "fish": shapes.Prompt("circle", "yellow", part=shapes.Part("triangle", "blue", "inside")),
}


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of naming the object. `row` says what happens to the embeddings: nothing, frozen or trained."""

    trigger: str  # token | prior | rare | phrase
    row: str = "none"
    rank: int = 16
    images: int = 15
    vectors: int = 1  # embeddings that the token's name stands for, one behind the other
    look_alike: bool = False  # a second token is taught beside it, for an object that looks alike
    rate_factor: float = 1.0  # of the default rate
    init_std: float = 1e-5
    remedy: str | None = None

    @property
    def tokens(self) -> tuple[str, ...]:
        """The names of its embeddings."""
        if self.look_alike:
            return (demo.TOKEN, SECOND_TOKEN)
        return (demo.TOKEN,) if self.vectors == 1 else tuple(f"<zwx_{index + 1}>" for index in range(self.vectors))

    def naming(self, kind: str) -> dict[str, shapes.Prompt]:
        """How captions and prompts call the objects that are taught, by their kinds."""
        if self.look_alike:
            kinds = (kind, shapes.LOOK_ALIKES[kind])
            return {own: shapes.Prompt(token) for own, token in zip(kinds, self.tokens, strict=True)}
        if self.trigger == "phrase":
            return {kind: PHRASES[kind]}
        name = {"token": "".join(self.tokens), "prior": shapes.TOK, "rare": RARE_WORD}[self.trigger]
        return {kind: shapes.Prompt(name)}


ARMS: dict[str, Arm] = {
    "prior word": Arm("prior"),
    "prior word, row trained": Arm("prior", "trained"),
    "rare word": Arm("rare"),
    "phrase": Arm("phrase"),
    "fresh token, frozen": Arm("token", "frozen"),
    "fresh token, trained": Arm("token", "trained"),
}
SWEEP: dict[str, Arm] = {
    **{f"rate x{factor:g}": Arm("token", "trained", rate_factor=factor) for factor in (0.1, 0.3, 3.0, 10.0)},
    **{f"init std {std:g}": Arm("token", "trained", init_std=std) for std in (0.0, 1e-3, 2e-2)},
}
REMEDIES: dict[str, Arm] = {
    name: Arm("token", "trained", remedy=name)
    for name in ("norm below the median", "frozen after a tenth", "trained after a tenth", "orthogonal to words")
}
# Where training the embedding should pay, if anywhere: a LoRA that can carry little, few images, more embeddings, and
# objects that only their tokens tell apart.
PAYS: dict[str, Arm] = {
    f"{name}, {row}": replace(arm, row=row)
    for name, arm in {
        **{f"rank {rank}": Arm("token", rank=rank) for rank in (1, 4)},
        "3 images": Arm("token", images=3),
        **{f"{vectors} embeddings": Arm("token", vectors=vectors) for vectors in (2, 4)},
        "two look-alikes": Arm("token", images=8, look_alike=True),
        "two look-alikes, std 1e-3": Arm("token", images=8, look_alike=True, init_std=1e-3),
    }.items()
    for row in ("frozen", "trained")
}
