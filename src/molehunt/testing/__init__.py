"""What tests need, ours and those of plug-in authors: planted suspects and the contracts of defenses and attacks.

```python
from molehunt.testing import check_attack, check_defense

def test_contract():
    check_defense(MyDefense())
    check_attack(MyAttack())
```
"""

from molehunt.testing.attacks import ATTACK_CHECKS, CRAFT_CHECKS, bench_for, check_attack
from molehunt.testing.defenses import DEFENSE_CHECKS, Trial, check_defense
from molehunt.testing.planted import Planted, PlantedTask, attack_success, auc, planted, share_right

__all__ = [
    "ATTACK_CHECKS",
    "CRAFT_CHECKS",
    "DEFENSE_CHECKS",
    "Planted",
    "PlantedTask",
    "Trial",
    "attack_success",
    "auc",
    "bench_for",
    "check_attack",
    "check_defense",
    "planted",
    "share_right",
]
