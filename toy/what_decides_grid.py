"""What decides whether SPLAM is better than LCM? The times at which sub-paths start: few, all, or where none ends.

As it is, sub-paths start at 50 times, 20 apart, and k = 100 is a multiple of 20, so they end where others start. With
k = 50 on the same grid, "off the grid", each ends at a time where none starts.
"""

from data import program
from toy.laboratory import Laboratory
from toy.what_decides import picture, setting

VARIANTS = {
    **setting("as it is"),
    **setting("10 starts", flags="--num_ddim_timesteps 10"),
    **setting("1000 starts", flags="--num_ddim_timesteps 1000"),
    **setting("k = 50", flags="--k 50 --solver_step 25 --num_ddim_timesteps 20"),
    **setting("k = 50, off the grid", flags="--k 50 --solver_step 25"),
}


@program
def main() -> None:
    Laboratory(__file__, __doc__).report(VARIANTS, picture)


if __name__ == "__main__":
    main()
