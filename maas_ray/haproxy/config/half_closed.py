"""GET and HEAD of clients that end their sending side with the request (`nc -N`): answered, where Serve's HAProxy refuses.

To HAProxy such a client looks like one that has left. Serve has it end the requests of these (`option abortonclose`),
which frees the replicas of inference that nobody waits for. A GET is over in milliseconds, so it need not end early: it goes
to a twin of its back end without that option, the same servers under the health checks of the first.
"""

from maas_ray.haproxy.config.sections import Section
from maas_ray.haproxy.config.twins import READS, has_servers, lead_to, twin_of

_HTTP = "backend http-"


def add_twins(sections: list[Section], frontend: Section) -> None:
    """Gives each HTTP back end of an application a twin for GET and HEAD, and the rules that lead there.

    Args:
        sections: of the whole configuration, edited otherwise already.
        frontend: the one of HTTP.
    """
    first = [section for section in sections if section[0].startswith(_HTTP) and has_servers(section)]
    sections += [twin_of(section, READS, ["    no option abortonclose"]) for section in first]
    names = [section[0].removeprefix("backend ") for section in first]
    # METH_GET is true of HEAD, too. Most requests fail it at once.
    lead_to({name: f"{READS}{name}" for name in names}, frontend, "METH_GET")
