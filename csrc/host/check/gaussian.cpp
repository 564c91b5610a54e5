#include "../../core/gaussian.h"

#include "check.h"

namespace lowrank {
namespace {

template <class T>
void rows(const char* name, int64_t first, int64_t last, int64_t rank) {
  compare(name, [&](int threads) {
    std::vector<T> out((last - first) * rank);
    const GaussianBasis b = gaussian_basis(-5, 3, 7, rank);
    run_block(threads, [&](const auto& block) {
      for (int64_t group = first / kGroup; group * kGroup < last; ++group)
        for (int64_t column = 0; column < rank; column += kWide)
          gaussian_rows<PhiloxWords>(block, &out[column], rank, group, column, int(rank - column < kWide ? rank - column : kWide),
                                     first, last, b);
    });
    Result result;
    result.add(out);
    return result;
  });
}

}  // namespace

void check_gaussian() {
  rows<float>("Gaussian basis fp32", 0, 130, 70);
  rows<bf16>("Gaussian basis bf16, a shard", 37, 101, 3);
}

}  // namespace lowrank
