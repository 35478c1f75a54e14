from pipelines.platform.text import table


def test_columns_are_aligned_by_what_a_terminal_shows():
    """A Japanese letter takes two columns, an accent of its own none."""
    assert table([("task", "images"), ("\u732b\u3068\u72ac", "12"), ("Cafe\u0301", "7"),
                  ("Stra\u00dfe", "")]) == [
        "task    images", "\u732b\u3068\u72ac  12", "Cafe\u0301    7", "Stra\u00dfe"]
