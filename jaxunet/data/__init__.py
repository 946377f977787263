"""Datasets: checked, prepared once with TFDS, read at random.

May import the ground.
"""

from jaxunet.data.prepare import prepare
from jaxunet.data.prepared import Prepared
from jaxunet.data.records import Example, Records

__all__ = ["Example", "Prepared", "Records", "prepare"]
