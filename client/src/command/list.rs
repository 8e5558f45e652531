//! `loopctl list`.

use loopd_dbus::ListOptions;
use loopd_dbus::proxy::Interaction;

use crate::cli::List;
use crate::output::json::Device;
use crate::output::table::{Row, Style, render, terminal_width};
use crate::{connection, output, partition, target};

/// Prints the table or the array.
pub async fn run(args: &List, no_color: bool) -> anyhow::Result<u8> {
    let bus = connection::open(Interaction::Forbidden).await?;
    let options = ListOptions { all: args.all, ..ListOptions::default() };
    let mut attached = target::list(&bus.manager, &options).await?;
    partition::add(&bus.connection, &mut attached).await?;
    if args.json {
        output::print_json(&attached.iter().map(Device::from).collect::<Vec<_>>())?;
    } else {
        let rows: Vec<Row> = attached.iter().map(|one| Row::new(one, &args.columns)).collect();
        let style =
            Style { legend: !args.no_legend, bold: output::is_styled(no_color), width: terminal_width() };
        output::print(&render(&args.columns, &rows, style))?;
    }
    Ok(0)
}
