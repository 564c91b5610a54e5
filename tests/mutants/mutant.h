// Which mutant runs: the number in LOWRANK_MUTANT, 0 for none. Included before every source of a mutated build.
#pragma once

#include <cstdlib>

// One a translation unit: objects of several instruction sets must not share its code.
static const int lr_mutant_chosen = std::getenv("LOWRANK_MUTANT") ? std::atoi(std::getenv("LOWRANK_MUTANT")) : 0;

static inline bool lr_mutant(int number) { return lr_mutant_chosen == number; }
