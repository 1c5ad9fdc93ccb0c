"""GET and HEAD of clients that close their sending side with the request (`nc -N`): answered; Serve's HAProxy refuses
them.

To HAProxy such a client looks like one that has disconnected. Serve makes it abort their requests (`option
abortonclose`), which frees replicas from unwanted inference. A GET takes milliseconds, so it need not be aborted: it is
routed to a twin of its back end without that option, with the same servers and the health checks of the first.
"""

from maas_ray.haproxy.config.sections import Section
from maas_ray.haproxy.config.twins import READS, has_servers, lead_to, twin_of

_HTTP = "backend http-"


def add_twins(sections: list[Section], frontend: Section) -> None:
    """Adds a twin for GET and HEAD to each HTTP back end of an application, and the rules that route to it.

    Args:
        sections: whole configuration, after all other edits.
        frontend: HTTP front end.
    """
    first = [section for section in sections if section[0].startswith(_HTTP) and has_servers(section)]
    sections += [twin_of(section, READS, ["    no option abortonclose"]) for section in first]
    names = [section[0].removeprefix("backend ") for section in first]
    # METH_GET also matches HEAD. Most requests fail it immediately.
    lead_to({name: f"{READS}{name}" for name in names}, frontend, "METH_GET")
