"""The contract that every link passes; other packages run it on theirs.

```python
from dgavg.testing import check_link

def test_my_link():
    check_link("mylink", strength=0.5)
```
"""

from dgavg.testing.contract import (
    check_in_place,
    check_link,
    check_reentrant,
    check_resume,
    is_shadow,
)
from dgavg.testing.toy import ToyBatches, toy_model, toy_run

__all__ = [
    "ToyBatches",
    "check_in_place",
    "check_link",
    "check_reentrant",
    "check_resume",
    "is_shadow",
    "toy_model",
    "toy_run",
]
