"""Which pictures a cut of a validation split moves (data_process_utils.py, --validation_fraction).

It takes round(fraction * n) pictures of each class folder, at least one and never all. Which ones depends on the seed
and on the pictures' pixels only, not on their names or their order on the disk. Duplicates and near-duplicates
(duplicates.py) go together, so a class with many of them may get a smaller share.
"""

import hashlib
from collections import Counter, defaultdict


def choose(pictures, fraction: float, seed: int) -> list[str]:
    """The names to move, sorted. `pictures`: (class folder/name, pixel hash, group, is already held out) each.

    Groups are taken in the order of a hash of seed and pixels, each one if no class then exceeds its share. Groups
    with a picture that is already held out come first, whatever their size: they belong on that side.
    """
    groups, sizes, forced = defaultdict(list), Counter(), set()
    for name, pixels, group, held in pictures:
        if held:
            forced.add(group)
        else:
            groups[group].append((pixels, name, name.split("/")[0]))
            sizes[name.split("/")[0]] += 1
    share = {folder: min(max(round(fraction * n), 1), n - 1) for folder, n in sizes.items()}
    ranks = {group: hashlib.sha256(f"{seed} {min(rows)[0]}".encode()).digest() for group, rows in groups.items()}
    chosen, taken = [], Counter()
    for group in sorted(groups, key=lambda group: (group not in forced, ranks[group])):
        cost = Counter(folder for _, _, folder in groups[group])
        if group in forced or all(taken[folder] + n <= share[folder] for folder, n in cost.items()):
            taken += cost
            chosen += [name for _, name, _ in groups[group]]
    return sorted(chosen)


def describe_undivided(pictures, chosen: list[str]) -> str:
    """The classes that would have no held-out picture, or no other one, after moving `chosen`; "" if there are none.

    pictures: as choose() takes them.
    """
    groups, stay, leave, chosen = defaultdict(Counter), set(), set(), {*chosen}
    for name, _, group, held in pictures:
        folder = name.split("/")[0]
        (leave if held or name in chosen else stay).add(folder)
        if not held:
            groups[folder][group] += 1
    told = "{} (pictures {:,}, groups of near-duplicates {:,}, the smallest of them {:,})".format
    undivided = ((folder, groups[folder]) for folder in groups if folder not in stay & leave)
    return ", ".join(told(folder, sizes.total(), len(sizes), min(sizes.values())) for folder, sizes in undivided)
