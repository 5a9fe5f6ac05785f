"""Contracts that a policy of your own inherits as tests.

Subclass one in a test file and say how to make the policy; pytest finds the
rest:

    class TestMyRouter(RouterContract):
        def make(self):
            return MyRouter()

Nothing here imports pytest, so it works under any runner that collects
`test_...` methods.
"""

from .._face import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
