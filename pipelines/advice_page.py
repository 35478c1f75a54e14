"""placeholder"""


def render(advice):
    return ""
