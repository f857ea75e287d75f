#pragma once

#include <cstdint>

namespace normops {

// Joins the moments (mean and sum of squared deviations) of a set of `count` numbers with those of `added` more:
// Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
// The two ratios depend on the counts alone, so many channels with equal counts share them.
struct MomentsMerge {
  double share;  // weight of the added mean
  double cross;  // weight of the squared distance between the two means

  MomentsMerge(double count, double added) : share(added / (count + added)), cross(count * (added / (count + added))) {}

  __attribute__((always_inline)) void operator()(double& mean, double& m2, double added_mean, double added_m2) const {
    const double distance = added_mean - mean;
    mean += distance * share;
    m2 += added_m2 + distance * distance * cross;
  }
};

}  // namespace normops
