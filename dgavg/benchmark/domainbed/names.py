"""What DomainBed calls its algorithms, data sets and domains, in the order of its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dgavg.benchmark.results import title_of
from dgavg.data.published import plain

ALGORITHMS = (
    *("ERM", "ERMPlusPlus", "Fish", "IRM", "GroupDRO", "Mixup", "MLDG", "CORAL", "MMD", "DANN"),
    *("CDANN", "MTL", "SagNet", "ARM", "VREx", "RSC", "SD", "ANDMask", "SANDMask", "IGA"),
    *("SelfReg", "Fishr", "TRM", "IB_ERM", "IB_IRM", "CAD", "CondCAD", "Transfer"),
    *("CausIRL_CORAL", "CausIRL_MMD", "EQRM", "RDM", "ADRMX", "URM"),
)

ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "Debug28": ("0", "1", "2"),
    "Debug224": ("0", "1", "2"),
    "ColoredMNIST": ("+90%", "+80%", "-90%"),
    "RotatedMNIST": ("0", "15", "30", "45", "60", "75"),
    "VLCS": ("C", "L", "S", "V"),
    "PACS": ("A", "C", "P", "S"),
    "OfficeHome": ("A", "C", "P", "R"),
    "TerraIncognita": ("L100", "L38", "L43", "L46"),
    "DomainNet": ("clip", "info", "paint", "quick", "real", "sketch"),
    "SVIRO": (
        *("aclass", "escape", "hilux", "i3", "lexus"),
        *("tesla", "tiguan", "tucson", "x5", "zoe"),
    ),
    "WILDSCamelyon": tuple(f"hospital_{i}" for i in range(5)),
    "WILDSFMoW": tuple(f"region_{i}" for i in range(6)),
    **{
        f"Spawrious{kind}_{level}": ("Test", "SC_group_1", "SC_group_2")
        for kind in ("O2O", "M2M")
        for level in ("easy", "medium", "hard")
    },
}

# Chains of one link and `basic` that are an algorithm of DomainBed.
EQUIVALENTS = {
    "basic": "ERM",
    "andmask_basic": "ANDMask",
    "arm_basic": "ARM",
    "cdann_basic": "CDANN",
    "coral_basic": "CORAL",
    "dann_basic": "DANN",
    "eqrm_basic": "EQRM",
    "fish_basic": "Fish",
    "fishr_basic": "Fishr",
    "groupdro_basic": "GroupDRO",
    "iberm_basic": "IB_ERM",
    "ibirm_basic": "IB_IRM",
    "iga_basic": "IGA",
    "irm_basic": "IRM",
    "mixup_basic": "Mixup",
    "mldg_basic": "MLDG",
    "mmd_basic": "MMD",
    "mtl_basic": "MTL",
    "rsc_basic": "RSC",
    "sandmask_basic": "SANDMask",
    "sd_basic": "SD",
    "vrex_basic": "VREx",
}
_OTHER_NAMES = {"camelyon17": "WILDSCamelyon", "fmow": "WILDSFMoW"}


def algorithm_of(
    chain: str, trainer: Mapping[str, Any], candidate: str = "live", label: str = ""
) -> str:
    """The algorithm that a candidate of a chain is: `IRM`, `swad_irm_basic`, `swad_irm_basic:swad`.

    `trainer` has the settings of each link; `label` is written after the name of the chain.
    """
    name = EQUIVALENTS.get(chain, chain)
    if chain == "causirl_basic":
        name = f"CausIRL_{trainer['causirl']['statistic'].upper()}"
    if chain == "mixup_basic" and not trainer["mixup"].get("across", True):
        name = chain  # DomainBed's blends images of two domains
    return f"{name}{label}" if candidate == "live" else f"{name}:{candidate}{label}"


def dataset_of(data: Mapping[str, Any], domains: Sequence[str]) -> str:
    """DomainBed's name of a data set that it has, else our own.

    DomainBed knows domains by number, so the domains must be as many as its own, in its order.
    """
    ours = title_of(data)
    spelt = plain(ours + str(data.get("variant") or ""))
    for name, environments in ENVIRONMENTS.items():
        if plain(_OTHER_NAMES.get(spelt, spelt)) == plain(name) and _agree(domains, environments):
            return name
    return ours


def _agree(domains: Sequence[str], environments: Sequence[str]) -> bool:
    """Whether the names may mean the same domains: `art_painting` and `A`, `clipart` and `clip`."""
    return len(domains) == len(environments) and all(
        ours[:1].lower() == theirs[0].lower()
        for ours, theirs in zip(domains, environments, strict=True)
    )
