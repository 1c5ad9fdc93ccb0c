"""The private parts of Ray that maas-ray needs, each with the reason; no other package imports or replaces one.

Ray promises nothing about them, so its version is pinned exactly. One file for each part of Ray. What is called is a
function here; what we derive from is imported from here by the file that does. `contract` lists all of it with the
signatures that were read in Ray, and finds what another version has changed.
"""
