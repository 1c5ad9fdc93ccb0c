"""Wire formats: conversion between bytes and tensors. Independent of models, batchers and HTTP servers."""
