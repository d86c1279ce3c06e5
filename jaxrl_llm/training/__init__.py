"""Optimiser steps, trainers and checkpoints: they only compose the floors below."""
