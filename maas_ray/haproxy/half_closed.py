"""GET and HEAD of clients that end their sending side with the request (`nc -N`): answered, where Serve's HAProxy refuses.

To HAProxy such a client looks like one that has left. Serve has it end the requests of these (`option abortonclose`),
which frees the replicas of inference that nobody waits for. A GET is over in milliseconds, so it need not end early: it goes
to a twin of its back end without that option, the same servers under the health checks of the first.
"""

from maas_ray.haproxy.sections import Section

PREFIX = "reads-"
"""Before the name of the twin; the names of Serve's own begin with the protocol."""
_LEFT_OUT = ("default-server ", "option httpchk ", "http-check ", "#")
_KEPT = ("backup",)
"""Options of a server that hold without checks of its own. What it observes itself would take it down for good: it comes up
with the one that it tracks."""
_HTTP = "backend http-"


def add_twins(sections: list[Section], frontend: Section) -> None:
    """Gives each HTTP back end of an application a twin for GET and HEAD, and the rules that lead there.

    Args:
        sections: of the whole configuration, edited otherwise already.
        frontend: the one of HTTP.
    """
    twins = {section[0].removeprefix("backend "): _twin(section) for section in sections if _has_servers(section)}
    sections += twins.values()
    rules: Section = []
    for line in frontend:
        words = line.split()
        if words[:1] == ["use_backend"] and words[1] in twins:  # before the rule of the first, so that order is kept
            # The method first, which most requests fail at once. It is true of HEAD, too.
            rules.append(f"    use_backend {PREFIX}{words[1]} if METH_GET {' '.join(words[3:])}")
        rules.append(line)
    frontend[:] = rules


def _has_servers(section: Section) -> bool:
    return section[0].startswith(_HTTP) and any(line.startswith("    server ") for line in section)


def _twin(section: Section) -> Section:
    name = section[0].removeprefix("backend ")
    lines = [f"backend {PREFIX}{name}", "    no option abortonclose"]
    for line in section[1:]:
        words = line.split()
        if words[:1] == ["server"]:
            kept = [option for option in _KEPT if f" {option}" in line]
            lines.append(" ".join(["    server", *words[1:3], f"track {name}/{words[1]}", *kept]))
        elif not line.strip().startswith(_LEFT_OUT):
            lines.append(line)
    return lines
