"""What each system is made of, and what its candidates are."""

import torch

from clsnf.benchmark.systems import (
    SYSTEMS,
    Candidate,
    ComponentMaps,
    fused_candidates,
    last_candidate,
    single_candidates,
)
from clsnf.model.score_maps import fuse


def component_maps(
    classifier: torch.Tensor, finetuned: torch.Tensor, pretrained: torch.Tensor
) -> ComponentMaps:
    density = {("finetuned", 2): finetuned, ("pretrained", 2): pretrained}
    return ComponentMaps({8: classifier}, density, None, 0.0)


def test_a_system_s_map_is_made_of_its_own_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    classifier, finetuned, pretrained = (torch.rand(2, 4, 4, generator=generator) for _ in range(3))
    maps = component_maps(classifier, finetuned, pretrained)
    expected = {
        "classifier": classifier,
        "flow": finetuned,
        "fused": fuse(finetuned, classifier, 0.3),
        "cflow": pretrained,
        "fused_unshared": fuse(pretrained, classifier, 0.3),
    }
    for name, system in SYSTEMS.items():
        found = maps.scores(system, last_candidate(system, 8, 2, 0.3))
        torch.testing.assert_close(found.maps, expected[name])
        torch.testing.assert_close(found.scores, expected[name].amax(dim=(1, 2)))


def test_image_scores_come_from_the_map_of_their_own_weight() -> None:
    classifier, density = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    maps, system = component_maps(classifier, density, density), SYSTEMS["fused"]
    found = maps.scores(system, Candidate(8, 2, 0.3, 0.0))
    torch.testing.assert_close(found.scores, density.amax(dim=(1, 2)))
    torch.testing.assert_close(found.maps, fuse(density, classifier, 0.3))
    alike = maps.scores(system, Candidate(8, 2, 0.3))
    assert torch.equal(alike.scores, alike.maps.amax(dim=(1, 2)))


def test_the_settings_own_candidate_is_among_those_to_choose_from() -> None:
    for system in SYSTEMS.values():
        last = last_candidate(system, 8, 2, 0.33)
        if system.is_fused:
            candidates = fused_candidates([7, 8], [0, 2], 0.33)
        else:
            candidates = single_candidates(system, [7, 8], [0, 2])
        assert last in candidates
        assert len(candidates) == len(set(candidates))


def test_fused_candidates_are_given_once_where_validation_prefers_the_last() -> None:
    assert len(fused_candidates([8, 8], [2, 2], 0.5)) == 11
    assert len(fused_candidates([7, 8], [2, 2], 0.25)) == 24
    assert Candidate(8, 2, 0.0) in fused_candidates([7, 8], [2, 2], 0.25)
