"""Tests of sft_recipe/report."""
