//! `loopctl list`.

use loopd_dbus::ListOptions;
use loopd_dbus::proxy::Interaction;

use crate::bus::attachment::{add_partitions, list};
use crate::bus::connection::Bus;
use crate::cli::List;
use crate::image::file_state::add_file_states;
use crate::show::column::Column;
use crate::show::json::Device;
use crate::show::stdout::{is_styled, print, print_json, terminal_width};
use crate::show::table::{Row, Style, render};

/// Prints the table or the JSON array.
pub async fn run(args: &List, no_color: bool) -> anyhow::Result<u8> {
    let bus = Bus::open(Interaction::Forbidden).await?;
    let options = ListOptions { all: args.all, ..ListOptions::default() };
    let mut attachments = list(&bus.manager, &options).await?;
    add_partitions(&bus.connection, &mut attachments).await?;
    let needs_file = |column: &Column| matches!(column, Column::File | Column::Filestate);
    if args.json || args.columns.iter().any(needs_file) {
        add_file_states(&mut attachments).await;
    }
    if args.json {
        print_json(&attachments.iter().map(Device::from).collect::<Vec<_>>())?;
    } else {
        let rows: Vec<Row> = attachments.iter().map(|info| Row::new(info, &args.columns)).collect();
        let style = Style { legend: !args.no_legend, bold: is_styled(no_color), width: terminal_width() };
        print(&render(&args.columns, &rows, style))?;
    }
    Ok(0)
}
