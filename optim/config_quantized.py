"""Options of the low-rank methods that keep the weights in int8 too: Q-GaLore and Q-APOLLO."""

from dataclasses import dataclass, field
from typing import Any

from optim.config_base import States
from optim.config_lowrank import ApolloConfig, ApolloMiniConfig, Basis, Compat, GaLoreConfig


@dataclass(kw_only=True)
class QGaLoreConfig(GaLoreConfig):
    int8_weights = True
    name: str = "qgalore"
    states: States = States.int8
    basis: Basis = Basis.int4
    lazy: bool = True
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])

    def combination_problems(self) -> list[str]:
        if self.compat is Compat.authors:
            return [
                "optim.compat=authors: q-galore-torch adds steps to weights in bf16, where most of a small one is "
                "lost; leave it out"
            ]
        return super().combination_problems()


@dataclass(kw_only=True)
class QApolloConfig(ApolloConfig):
    int8_weights = True
    int8_group = 128
    name: str = "qapollo"
    q_compat: bool = False
    """Limit the growth of updates after Adam's bias correction, as the authors' Q-APOLLO, instead of before it, as
    their APOLLO; differs in the first steps, about 1/(1 - beta2) of them."""

    def options(self) -> dict[str, Any]:
        return super().options() | {"q_compat": self.q_compat}


@dataclass(kw_only=True)
class QApolloMiniConfig(ApolloMiniConfig, QApolloConfig):
    name: str = "qapollo_mini"
