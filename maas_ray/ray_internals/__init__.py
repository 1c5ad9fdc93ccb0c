"""The private API of Ray that maas-ray uses, with the reason for each use; no other package imports or replaces it.

It can change in any version of Ray, so that Ray's version is pinned exactly. One file for each part of Ray: it wraps
private functions, and exports private base classes. `contract` lists all private names with their signatures, and
finds the changes of another version.
"""
