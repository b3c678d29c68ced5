"""Every result is run beside the dense program with its removed columns masked before it is returned.

The check takes one thing from the analysis, which columns of which uses were removed, and none of what makes
the analysis believe that they can be. Whatever a rule, a layout or a pass gets wrong shows in the numbers.
"""
