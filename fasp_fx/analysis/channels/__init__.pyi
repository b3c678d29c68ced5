from ._facts import Layout as Layout, Pairs as Pairs, Product as Product, Remark as Remark, Use as Use
from ._interpreter import Interpreter as Interpreter, Walk as Walk
from ._numbering import Numbering as Numbering, Slot as Slot, Value as Value, marked as marked
