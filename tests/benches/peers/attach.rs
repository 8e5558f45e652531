//! The part `attach`: all sides attach and detach in turn, round by round.

use anyhow::{Context as _, Result};
use loopd_dbus::proxy::{Interaction, Manager};
use loopd_tests::host::built;
use loopd_tests::image::{Image, MIB};
use loopd_tests::process::installed;
use loopd_tests::report::statistics::ratio;
use loopd_tests::report::text_table::{TextTable, figure_or_dash};
use loopd_tests::sysfs::{Extent, Extents};
use loopd_tests::table::{self, Gpt, MOST_PARTITIONS};
use loopd_tests::{GAMES, Skipped};
use zbus::Connection;

use crate::authorization::Authorization;
use crate::commands::{Commands, Tool, connect};
use crate::ioctls::Ioctls;
use crate::names::{self, column, group, side};
use crate::results::{Key, Results};
use crate::scale::Scale;
use crate::scene::Scene;
use crate::side::{Round, Way};
use crate::udisks::Udisks;
use crate::workspace::Workspace;

const UUID: &str = "11111111-2222-3333-4444-000000000010";

/// A row of the table.
struct Side {
    group: &'static str,
    name: &'static str,
    way: Way,
    input: Input,
}

/// The image of a side.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Input {
    /// A file system.
    Plain,
    /// Two partitions.
    Two,
    /// The maximum number of partitions.
    Most,
}

struct Images {
    plain: Image,
    two: Image,
    most: Image,
}

impl Images {
    async fn new(scene: &Scene) -> Result<Self> {
        let directory = &scene.directory;
        let images = Self {
            plain: Image::ext4_sized(directory, "plain", "bench", UUID, 64 * MIB).await?,
            two: Image::sparse(directory, "two", 64 * MIB)?,
            most: table::with_most_partitions(directory, "most").await?,
        };
        Gpt::new(&[(2048, 43007), (43008, 131_000)]).write(&images.two)?;
        Ok(images)
    }

    /// The image, and its number of partitions.
    fn of(&self, input: Input) -> (&Image, usize) {
        match input {
            Input::Plain => (&self.plain, 0),
            Input::Two => (&self.two, 2),
            Input::Most => (&self.most, MOST_PARTITIONS as usize),
        }
    }
}

/// Measures all sides that this machine has. polkit and UDisks2 run beside all of them, as on a desktop.
pub async fn measure(workspace: &Workspace, scale: &Scale, results: &mut Results) -> Result<()> {
    let mut scene = Scene::start(workspace, "attach").await?;
    let images = Images::new(&scene).await?;
    if let Err(error) = scene.add_polkit().await {
        results.skip("polkit, an ordinary user and UDisks2", reason(error)?);
    }
    let (connection, manager) = scene.connect().await?;
    let user = if scene.has_polkit() { Some(scene.bus.connect_as(GAMES).await?) } else { None };
    let authorization = user.as_ref().map(|user| Authorization::new(connection.clone(), user)).transpose()?;
    let floors = Floors { bus: scene.bus.address().to_owned(), authorization };
    let mut sides = own_sides(&manager, &images, scale).await?;
    if scale.most_rounds == 0 {
        results.skip(group::MOST, "only with --bench");
    }
    if let Some(user) = &user {
        add_user(&mut sides, user).await?;
    }
    add_peers(&mut sides, &scene, results).await?;
    sides.sort_by_key(|side| group::ALL.iter().position(|group| *group == side.group));
    for round in 0..scale.rounds {
        let mut failed = Vec::new();
        for side in sides.iter().filter(|side| side.input != Input::Most || is_turn(round, scale)) {
            let (image, partitions) = images.of(side.input);
            match side.way.round(image, partitions).await {
                Ok(times) => side.add(times, results),
                Err(error) if side.is_foreign() => {
                    results.skip(side.name, format!("it failed in round {round}: {error:#}"));
                    failed.push(side.name);
                }
                Err(error) => return Err(error.context(format!("{}, {}", side.group, side.name))),
            }
        }
        sides.retain(|side| !failed.contains(&side.name));
        floors.measure(results).await?;
    }
    Ok(())
}

/// What loopd and loopctl cannot be faster than.
struct Floors {
    bus: String,
    authorization: Option<Authorization>,
}

impl Floors {
    async fn measure(&self, results: &mut Results) -> Result<()> {
        let key = |group, side, column| Key { table: names::table::ATTACH, group, side, column };
        for column in [column::ATTACH, column::DETACH] {
            results.add_time(key(group::COMMANDS, side::CONNECT, column), connect(&self.bus)?);
        }
        if let Some(authorization) = &self.authorization {
            let time = authorization.check().await?;
            results.add_time(key(group::REPLY, side::POLKIT, column::ATTACH), time);
        }
        Ok(())
    }
}

/// Whether the image with the most partitions is attached in this round: udev needs long for it.
fn is_turn(round: usize, scale: &Scale) -> bool {
    scale.most_rounds > 0 && round.is_multiple_of(scale.rounds.div_ceil(scale.most_rounds))
}

/// The text of an error that only skips a side.
fn reason(error: anyhow::Error) -> Result<String> {
    Ok(error.downcast::<Skipped>()?.to_string())
}

impl Side {
    fn add(&self, times: Round, results: &mut Results) {
        let key = |column| Key { table: names::table::ATTACH, group: self.group, side: self.name, column };
        results.add_time(key(column::ATTACH), times.attach);
        results.add_time(key(column::DETACH), times.detach);
    }

    /// Whether it is a program that is not part of the project, so its failure is none of the benchmark.
    fn is_foreign(&self) -> bool {
        [side::UDISKS, side::UDISKSCTL, side::LOSETUP, side::LOSETUP_SETTLE].contains(&self.name)
    }
}

async fn own_sides(manager: &Manager, images: &Images, scale: &Scale) -> Result<Vec<Side>> {
    let loopd = |waits| Way::Loopd { manager: manager.clone(), waits };
    let mut sides = vec![
        Side {
            group: group::REPLY,
            name: side::IOCTLS,
            way: Way::Ioctls(Ioctls::new(false)?),
            input: Input::Plain,
        },
        Side { group: group::REPLY, name: side::LOOPD, way: loopd(false), input: Input::Plain },
        Side {
            group: group::PROCESSED,
            name: side::IOCTLS,
            way: Way::Ioctls(Ioctls::new(true)?),
            input: Input::Plain,
        },
        Side { group: group::PROCESSED, name: side::LOOPD, way: loopd(true), input: Input::Plain },
    ];
    for (group, input) in [(group::TWO, Input::Two), (group::MOST, Input::Most)] {
        if input == Input::Most && scale.most_rounds == 0 {
            continue;
        }
        let floor = Ioctls::with_partitions(to_add(images.of(input).0).await?)?;
        sides.push(Side { group, name: side::IOCTLS, way: Way::Ioctls(floor), input });
        sides.push(Side { group, name: side::LOOPD, way: loopd(true), input });
    }
    Ok(sides)
}

/// The partitions that the kernel does not add itself.
async fn to_add(image: &Image) -> Result<Extents> {
    if table::kernel_reads()? {
        return Ok(Extents::new());
    }
    let entries = table::of(image.name(), 512).await?;
    let extent = |entry: table::Entry| Extent { start: entry.offset, size: entry.size };
    Ok(entries.into_iter().map(|(number, entry)| (number, extent(entry))).collect())
}

async fn add_user(sides: &mut Vec<Side>, connection: &Connection) -> Result<()> {
    let manager = Manager::new(connection, Interaction::Forbidden).await?;
    for (group, waits) in [(group::REPLY, false), (group::PROCESSED, true)] {
        let way = Way::Loopd { manager: manager.clone(), waits };
        sides.push(Side { group, name: side::LOOPD_USER, way, input: Input::Plain });
    }
    Ok(())
}

async fn add_peers(sides: &mut Vec<Side>, scene: &Scene, results: &mut Results) -> Result<()> {
    let mut add = |group, name, way| sides.push(Side { group, name, way, input: Input::Plain });
    let commands = |tool| Way::Commands(Commands { tool, bus: scene.bus.address().to_owned() });
    add(group::COMMANDS, side::LOSETUP, commands(Tool::Losetup));
    add(group::COMMANDS, side::LOSETUP_SETTLE, commands(Tool::LosetupAndSettle));
    if built("loopctl").exists() {
        add(group::COMMANDS, side::LOOPCTL_NO_WAIT, commands(Tool::LoopctlNoWait));
        add(group::COMMANDS, side::LOOPCTL, commands(Tool::Loopctl));
    } else {
        results.skip("loopctl", "it is not built");
    }
    if !scene.has_polkit() {
        return Ok(());
    }
    match Udisks::start(&scene.bus).await {
        Ok(udisks) => {
            add(group::PROCESSED, side::UDISKS, Way::Udisks(udisks));
            if installed("udisksctl") {
                add(group::COMMANDS, side::UDISKSCTL, commands(Tool::Udisksctl));
            } else {
                results.skip("udisksctl", "it is not installed");
            }
        }
        Err(error) => results.skip("UDisks2 and udisksctl", reason(error).context("UDisks2")?),
    }
    Ok(())
}

/// The table of medians, 95th percentiles and ratios.
pub fn table(results: &Results) -> TextTable {
    let mut table =
        TextTable::new(&["milliseconds", "attach", "p95", "ratio", "detach", "p95", "ratio", "rounds"]);
    for group in results.groups(names::table::ATTACH) {
        table.group(group);
        let sides = results.sides(names::table::ATTACH, group);
        for name in &sides {
            let key = |side, column| Key { table: names::table::ATTACH, group, side, column };
            let mut cells = Vec::new();
            for column in [column::ATTACH, column::DETACH] {
                let samples = results.samples(key(name, column));
                let median = samples.and_then(|samples| samples.median());
                cells.push(figure_or_dash(median));
                cells.push(figure_or_dash(samples.and_then(|samples| samples.percentile(95))));
                cells.push(figure_or_dash(ratio(median, results.median(key(sides[0], column)))));
            }
            cells.push(results.samples(key(name, column::ATTACH)).map_or(0, |s| s.count()).to_string());
            table.row(format!("  {name}"), cells);
        }
    }
    table
}
