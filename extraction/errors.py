"""The two ways a run ends early. Both carry one line that a person can act on."""


class Stop(Exception):
    """Something the person running the script can put right: one line that names the file or value, and the fix.

    Scripts print it without a traceback and end with exit status 1.
    """


class BudgetExhausted(Stop):
    """The query budget leaves no room for the clips asked about. Nothing was answered and nothing was billed."""
